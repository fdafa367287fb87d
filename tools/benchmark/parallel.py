"""What parallelism of the diffusion model sends, and where it stops to pay.

    python tools/benchmark/parallel.py

measures the bytes that every process sends per forward on a small model (gloo on this machine, 2 and 4 processes),
beside the formula for Ulysses, ring attention and tensor parallelism; then prints a model of sampling time for 1 to 512
devices from operations, bytes and bandwidths, beside the times that Open-Sora 2.0 reports. Two figures of the model are
fitted to those: the share of peak speed that a device reaches, and the time that more devices do not shorten.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.acceleration.plugins import divide_model
from opensora.acceleration.sequence_parallel import Part
from opensora.config import run_main
from opensora.config.options import PluginOptions
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.flops import forward_flops
from opensora.utils.temporary import TemporaryFolder
from tools.arguments import Bounded
from tools.benchmark.traffic import bytes_sent

WAYS = {"ulysses": ("sp", "all_to_all"), "ring": ("sp", "ring_attn"), "tp": ("tp", "ring_attn")}
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Workload:
    """A video to sample, and the seconds that Open-Sora 2.0 reports for it by number of devices (H100, 50 steps)."""

    name: str
    image_tokens: int
    reported: Mapping[int, float] = field(hash=False)
    reported_way: str
    text_tokens: int = 512
    branches: int = 3  # guidance branches that the reported times run at every step, as one batch
    steps: int = 50


WORKLOADS = (
    Workload("256px, 129 frames", 33 * 12 * 21, {1: 60, 2: 40, 4: 34}, "tp"),
    Workload("768px, 129 frames", 33 * 36 * 64, {1: 1656, 2: 863, 4: 466, 8: 276}, "ring"),
)


def released_config() -> MMDiTConfig:
    """The 11B model."""
    return MMDiTConfig(
        in_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=19,
        depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10_000, qkv_bias=True, guidance_embed=False,
        cond_embed=True, fused_qkv=False, use_liger_rope=True,
    )  # fmt: skip


def small_config() -> MMDiTConfig:
    """A model that two CPU cores run in a second."""
    return MMDiTConfig(
        in_channels=16, vec_in_dim=16, context_in_dim=32, hidden_size=128, mlp_ratio=2.0, num_heads=8, depth=2,
        depth_single_blocks=4, axes_dim=[4, 6, 6], theta=10_000, qkv_bias=True, guidance_embed=False,
        fused_qkv=False, use_liger_rope=True,
    )  # fmt: skip


def bytes_per_forward(
    config: MMDiTConfig, way: str, ranks: int, image: int, text: int, batch: int = 1, width: int = 2
) -> float:
    """Bytes that one rank sends in one forward.

    Per block, Ulysses exchanges q, k, v and the output, the share (n - 1) / n of each; a ring passes keys and values on
    n - 1 times; tensor parallelism sums the outputs of row-split layers (four in a double block, over its text or image
    tokens, one in a single block) by ring all-reduce, 2 (n - 1) / n of each. Sequence parallelism ends with gathering
    the output.

    Args:
        config: the model.
        way: ulysses, ring or tp.
        ranks: n.
        image, text: tokens.
        batch: samples.
        width: bytes per element.
    """
    blocks, hidden = config.depth + config.depth_single_blocks, config.hidden_size
    if way == "tp":
        sums = (2 * config.depth + config.depth_single_blocks) * (image + text)
        return width * batch * sums * hidden * 2 * (ranks - 1) / ranks
    own = Part.of(image, ranks).size + Part.of(text, ranks).size
    per_block = 4 * own * (ranks - 1) / ranks if way == "ulysses" else 2 * own * (ranks - 1)
    gathered = Part.of(image, ranks).size * config.in_channels * (ranks - 1)
    return width * batch * (blocks * per_block * hidden + gathered)


# ------------------------------------------------------------------------------------------------------------ measured


def sent_per_forward(way: str, image: int, text: int) -> int:
    """Bytes that this process sends in one forward of the small model in float32; all processes call it."""
    axis, mode = WAYS[way]
    config = small_config()
    model = MMDiTModel(config).eval()
    context = ParallelContext.create(Sizes(**{axis: dist.get_world_size()}))
    divide_model(model, context, PluginOptions(sequence_parallelism_mode=mode))
    inputs: dict[str, Any] = {
        "img": torch.randn(1, image, config.in_channels),
        "img_ids": torch.zeros(1, image, 3),
        "txt": torch.randn(1, text, config.context_in_dim),
        "txt_ids": torch.zeros(1, text, 3),
        "timesteps": torch.rand(1),
        "y_vec": torch.randn(1, config.vec_in_dim),
    }
    with torch.no_grad():
        model(**inputs)  # connections are made, kernels chosen
        before = bytes_sent()
        model(**inputs)
        return bytes_sent() - before


def _measure(rank: int, ranks: int, folder: str, way: str, image: int, text: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    (Path(folder) / f"sent{rank}").write_text(str(sent_per_forward(way, image, text)))
    dist.barrier()
    dist.destroy_process_group()


def measured_bytes(way: str, ranks: int, image: int, text: int) -> float:
    """Bytes that a rank sends in one forward of the small model in float32, the mean over ranks."""
    with TemporaryFolder() as folder:
        multiprocessing.spawn(_measure, (ranks, folder, way, image, text), ranks)
        return sum(int(path.read_text()) for path in folder.glob("sent*")) / ranks


def traffic_table(ranks: Sequence[int], image: int, text: int) -> str:
    """Measured bytes beside the formula."""
    lines = ["| way | processes | measured | formula | difference |", "|---|---|---|---|---|"]
    for way in WAYS:
        for n in ranks:
            found = measured_bytes(way, n, image, text)
            expected = bytes_per_forward(small_config(), way, n, image, text, width=4)
            lines.append(f"| {way} | {n} | {found:,.0f} | {expected:,.0f} | {found / expected - 1:+.2%} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- modelled


@dataclass(frozen=True)
class Machine:
    """Speeds of a cluster.

    Args:
        tflops: peak of a device in bf16, in TFLOP/s.
        inside: GB/s that a device can send inside its machine.
        between: GB/s that it can send to another machine.
        per_machine: devices of a machine.
    """

    tflops: float = 989.0
    inside: float = 450.0
    between: float = 50.0
    per_machine: int = 8

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second that the slowest link of a group of neighbours gives a rank."""
        return 1e9 * (self.inside if ranks <= self.per_machine else self.between)


@cache
def step_flops(load: Workload) -> float:
    """Operations of one step of the released model."""
    with torch.device("meta"):
        model = MMDiTModel(released_config())
    return load.branches * forward_flops(model, load.image_tokens, load.text_tokens)


@cache
def fitted(load: Workload) -> tuple[float, float]:
    """Seconds of a video that divide over devices, and those that do not, by least squares on the reported times."""
    divided, fixed = np.polyfit([1 / n for n in load.reported], list(load.reported.values()), 1)
    return float(divided), float(fixed)


def seconds(load: Workload, way: str, ranks: int, machine: Machine) -> float | None:
    """Modelled time of a video; None where the heads cannot be divided.

    Arithmetic divides evenly. A ring's exchange is hidden behind its arithmetic as far as that lasts; that of Ulysses
    and tensor parallelism is waited for. Text encoders and decoding are part of what does not divide.
    """
    config = released_config()
    if way != "ring" and config.num_heads % ranks:
        return None
    divided, fixed = fitted(load)
    sent = bytes_per_forward(config, way, ranks, load.image_tokens, load.text_tokens, load.branches)
    compute, exchange = divided / ranks, load.steps * sent / machine.bandwidth(ranks)
    return fixed + (max(compute, exchange) if way == "ring" else compute + exchange)


def scaling_table(load: Workload, machine: Machine) -> str:
    """Modelled seconds per video by number of devices, beside the reported ones."""
    divided, fixed = fitted(load)
    share = load.steps * step_flops(load) / (divided * machine.tflops * 1e12)
    lines = [
        f"{load.name}: a device reaches {share:.0%} of its peak, {fixed:.0f} s do not divide.\n",
        f"| devices | {' | '.join(WAYS)} | efficiency of the best | reported ({load.reported_way}) |",
        "|---" * (len(WAYS) + 3) + "|",
    ]
    for n in DEVICES:
        times = [seconds(load, way, n, machine) for way in WAYS]
        best = min(t for t in times if t is not None)
        shown = " | ".join("-" if t is None else f"{t:.1f} s" for t in times)
        reported = f"{load.reported[n]:.0f} s" if n in load.reported else ""
        lines.append(f"| {n} | {shown} | {load.reported[1] / n / best:.0%} | {reported} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes",
        type=int,
        action=Bounded,
        least=1,
        most=64,
        nargs="*",
        default=[2, 4],
        help="to measure with (default: 2 4)",
    )
    default = "(default: %(default)s)"
    tokens: dict[str, Any] = {"type": int, "action": Bounded, "least": 1, "most": 10**6}
    parser.add_argument("--image", **tokens, default=601, help=f"image tokens to measure with {default}")
    parser.add_argument("--text", **tokens, default=50, help=f"text tokens to measure with {default}")
    rate: dict[str, Any] = {"type": float, "action": Bounded, "least": 0.001, "most": 1e6}
    parser.add_argument("--tflops", **rate, default=989.0, help=f"peak of a device in bf16 {default}")
    parser.add_argument("--inside", **rate, default=450.0, help=f"GB/s inside a machine {default}")
    parser.add_argument("--between", **rate, default=50.0, help=f"GB/s between machines {default}")
    args = parser.parse_args(argv)
    if args.processes:
        print("Bytes that a process sends per forward (small model, float32):\n")
        print(traffic_table(args.processes, args.image, args.text), end="\n\n")
    machine = Machine(args.tflops, args.inside, args.between)
    for load in WORKLOADS:
        print(scaling_table(load, machine), end="\n\n")


if __name__ == "__main__":
    run_main(main)
