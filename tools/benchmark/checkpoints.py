"""How long training stands still for a checkpoint: written at once, or beside training.

python tools/benchmark/checkpoints.py --megabytes 512
torchrun --nproc-per-node 2 tools/benchmark/checkpoints.py --megabytes 512
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.acceleration.parallel_context import ParallelContext, launch
from opensora.acceleration.plugins import create_context
from opensora.acceleration.sharding import Gathered
from opensora.config import run_main
from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.checkpoint.folder import RunningStates
from opensora.training.checkpoint.writer import CheckpointWriter
from opensora.utils.errors import UserError
from opensora.utils.temporary import TemporaryFolder
from tools.arguments import Bounded, user_path

SIDE = 1024  # of the matrices, of 4 MiB each


def matrices(megabytes: int, context: ParallelContext) -> Mapping[str, Tensor]:
    """Random weights of that size; several processes divide them, and put each together when it is read."""
    generator = torch.Generator().manual_seed(0)
    whole = {f"w{i}": torch.randn(SIDE, SIDE, generator=generator) for i in range(max(megabytes // 4, 1))}
    if context.world_size == 1:
        return whole
    mesh = context.replica_mesh
    parts = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}
    return Gathered(parts, lambda name, value: value.full_tensor())


def stand_still(writer: CheckpointWriter, weights: Mapping[str, Tensor], step: int) -> tuple[float, float]:
    """Seconds until training goes on after a checkpoint, and until that is written.

    Raises:
        UserError: it cannot be.
    """
    if dist.is_initialized():
        dist.barrier()
    start = perf_counter()
    target = writer.save(CheckpointContent(RunningStates(0, step, step, step), weights, {}))
    stood = perf_counter() - start
    writer.wait()
    written = perf_counter() - start
    if not target.is_dir():  # training would go on
        raise UserError(f"{target}: a checkpoint could not be written, for the reason above")
    return stood, written


def measure(folder: Path, megabytes: int, repeats: int, context: ParallelContext) -> dict[str, tuple[float, float]]:
    """Medians by way of writing, in turns."""
    weights, shard = matrices(megabytes, context), max(megabytes // 8, 4) * 2**20
    writers = {
        beside: CheckpointWriter(folder / str(beside), 1, beside, context.host, shard) for beside in (False, True)
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for step in range(repeats + 1):
        for beside, writer in writers.items():
            name = "at once" if not beside else "beside, first" if step == 0 else "beside, later"
            found.setdefault(name, []).append(stand_still(writer, weights, step))
    return {name: (median(a for a, _ in times), median(b for _, b in times)) for name, times in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": int, "action": Bounded, "least": 1}
    parser.add_argument("--megabytes", **number, most=10**6, default=512, help="size of the checkpoint")
    parser.add_argument("--repeats", **number, most=1000, default=3, help="checkpoints of each kind, after the first")
    parser.add_argument("--folder", type=user_path, help="where to write; none takes a temporary one")
    args = parser.parse_args(argv)
    device, ranks = torch.device("cpu"), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        launch(device)
    context = create_context("fsdp2", None, device) if ranks > 1 else ParallelContext(device=device)
    with TemporaryFolder(args.folder) as scratch:
        shared = [str(scratch)]
        if ranks > 1:
            dist.broadcast_object_list(shared)
        found = measure(Path(shared[0]), args.megabytes, args.repeats, context)
        if ranks > 1:
            dist.barrier()
    if context.rank == 0:
        print(f"{args.megabytes} MB, {ranks} process(es)\n\n| | stands still | until written |\n|---|---|---|")
        for name, (stood, written) in found.items():
            print(f"| {name} | {stood:.2f} s | {written:.2f} s |")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
