"""Speed of a training config: step time, rates, share of the peak, data wait, memory, and what the trainer adds.

``python tools/benchmark/training.py CONFIG [--steps N] [--warm-up N] [--bucket RESOLUTION,FRAMES,BATCH] [--clips N]
[--overhead] [--out FILE.json] [--key value ...]``

``python tools/benchmark/training.py CONFIG --memory`` prints bytes of each device by part, for all engines at 1, 8 and
64 ranks, from sizes alone.

Without ``--dataset.data-path`` it trains on clips that it draws. ``--overhead`` also runs, after each of the trainer's
steps, a bare forward, backward and update of a copy of the model on one prepared batch, and compares the two.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from torch import nn

from opensora.acceleration.plugins import NATIVE
from opensora.config import load_config, parse_config, run_main
from opensora.config.commands import TrainOptions
from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataloader import to_device
from opensora.datasets.dataset import collate
from opensora.training.diffusion.checks import check_config
from opensora.training.diffusion.inputs import InputEncoder, diffusion_loss
from opensora.training.diffusion.memory import PARTS, Trained, encoder_bytes, held, in_host
from opensora.training.diffusion.trainer import Trainer
from opensora.training.hooks import Hook
from opensora.training.loop import step_generator
from opensora.training.report.metrics import MetricLog
from opensora.training.weights.adapters import TrainedWeights
from opensora.training.weights.ema import EMA
from opensora.training.weights.optimizer import create_optimizer
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.sizes import gib
from opensora.utils.temporary import TemporaryFolder
from opensora.utils.video import save_image, save_video
from tools.arguments import Bounded, Converted
from tools.outputs import add_overwrite, check_new

CURVES = ("seconds_per_step", "tokens_per_s", "samples_per_s", "tflops_per_s", "mfu", "data_wait", "memory_gib")
SYNTHETIC_FPS = 8


@dataclass
class Measured:
    """Seconds per step, of the trainer and of a bare loop: on the clock, and of processor time."""

    trainer: list[tuple[float, float]] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)


RANKS = (1, 8, 64)
ENGINES: tuple[tuple[str, dict[str, int]], ...] = (
    ("ddp", {}), ("fsdp2", {}), ("fsdp2", {"shard_size": 8}), ("zero1", {}), ("zero2", {}),
)  # fmt: skip


def draw_clips(folder: Path, bucket_config: dict, multiple: int, batches: int) -> str:
    """A table of plain-coloured clips that fill every bucket's 16:9 (or only) ratio with some batches.

    Args:
        folder: where clips and table go.
        bucket_config: see :mod:`opensora.datasets.buckets`.
        multiple: of heights and widths.
        batches: micro-batches per bucket.

    Returns:
        Path of the table.
    """
    rng, rows, seen = np.random.default_rng(0), [], set()
    for bucket in BucketTable(bucket_config, multiple).buckets:
        if (bucket.resolution, bucket.num_frames) in seen or (
            bucket.ratio != "16:9" and "_ar" not in bucket.resolution
        ):
            continue
        seen.add((bucket.resolution, bucket.num_frames))
        frames = np.empty((bucket.num_frames, bucket.height, bucket.width, 3), dtype=np.uint8)
        for number in range(bucket.batch_size * batches):
            frames[:] = rng.integers(0, 255, 3)
            stem = folder / f"{bucket.resolution.replace(':', '-')}_{bucket.num_frames}_{number}"
            image = bucket.num_frames == 1
            path = save_image(frames[0], f"{stem}.png") if image else save_video(frames, f"{stem}.mp4", SYNTHETIC_FPS)
            size = dict(num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)
            fps = float("nan") if image else SYNTHETIC_FPS
            rows.append(dict(path=path.name, text="a plain colour", fps=fps, **size))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return str(folder / "clips.csv")


def _needs_native(cfg: TrainOptions) -> bool:
    """Whether ColossalAI's plugins refuse a config."""
    return bool(cfg.lora_config) or cfg.optim.states == "host"


def memory_table(cfg: TrainOptions, ranks: Sequence[int] = RANKS) -> list[list[str]]:
    """GiB of each device by part, for every engine and number of ranks; a row each below the headings."""
    plan = check_config(load_config(cfg, TrainOptions, {"plugin": "none", "plugin_config": {}}))
    trained, encoders = Trained.of(cfg, plan.model), encoder_bytes(cfg, plan.model, plan.ae)
    rows = [["ranks", "engine", *PARTS, "sum", "host"]]
    for count in ranks:
        for name, more in ENGINES if count > 1 else [("none", {})]:
            if more.get("shard_size", 0) > count or (name not in (*NATIVE, "none") and _needs_native(cfg)):
                continue
            if cfg.optim.in_backward and name != "none":
                continue
            chosen = load_config(cfg, TrainOptions, {"plugin": name, "plugin_config": more})
            parts = held(chosen, trained, count, encoders)
            label = f"{name}, shard_size {more['shard_size']}" if more else name
            host = sum(in_host(chosen, trained, count).values())
            sizes = [*(parts[part] for part in PARTS), sum(parts.values()), host]
            rows.append([str(count), label, *map(gib, sizes)])
    return rows


class Stopwatch:
    """Takes the times between the trainer's steps, and those of a bare step after each.

    Args:
        wait: both clocks, once the device has nothing left to do.
        measured: gets the times.
        bare: the bare step, None for none.
    """

    def __init__(
        self, wait: Callable[[], tuple[float, float]], measured: Measured, bare: Callable[[], None] | None
    ) -> None:
        self.wait, self.measured, self.bare = wait, measured, bare
        self._last = wait()

    def after_step(self, step: int) -> None:
        now = self.wait()
        self.measured.trainer.append(_since(self._last, now))
        if self.bare is not None:
            self.bare()
            self.measured.bare.append(_since(now, self.wait()))
        self._last = self.wait()

    def close(self) -> None:
        """Nothing is held."""


class TimedTrainer(Trainer):
    """The trainer, with a stopwatch between its steps.

    Args:
        cfg: resolved config.
        measured: gets the times.
        overhead: run a bare step after each of the trainer's.
    """

    def __init__(self, cfg: TrainOptions, measured: Measured, overhead: bool) -> None:
        super().__init__(cfg)
        self.measured, self.overhead = measured, overhead
        if overhead and len({(b.num_frames, b.height, b.width) for b in self._used_buckets()}) > 1:
            raise UserError("--overhead compares steps of one size: give --bucket RESOLUTION,FRAMES,BATCH")

    def _used_buckets(self) -> list[Any]:
        """Buckets of the first batches."""
        keys = [batch[0] for _, batch in zip(range(50), iter(self.sampler))]
        return [b for b in self.sampler.table.buckets for k in keys if (b.num_frames, b.height, b.width) == k[1:4]]

    def _wait(self) -> tuple[float, float]:
        """Both clocks, once the device has nothing left to do."""
        if self.start.device.type == "cuda":
            torch.cuda.synchronize(self.start.device)
        return perf_counter(), process_time()

    def _hooks(
        self, weights: TrainedWeights, encoder: InputEncoder, ema: EMA | None, log: MetricLog, folder: Path,
        metadata: dict[str, str],
    ) -> list[Hook]:  # fmt: skip
        bare = self._bare_step(weights.model, encoder) if self.overhead else None
        return [Stopwatch(self._wait, self.measured, bare)]

    def _bare_step(self, trained: nn.Module, encoder: InputEncoder) -> Callable[[], None]:
        """Forward, backward, clipping and update of a copy of the model, on inputs that are ready."""
        model = copy.deepcopy(trained)
        optimizer = create_optimizer(model.named_parameters(), self.cfg.optim)
        parameters = [p for p in model.parameters() if p.requires_grad]
        batch = collate([self.dataset[key] for key in next(iter(self.sampler))])
        prepared = encoder(to_device(batch, self.start.device, self.start.dtype), step_generator(0, 0, 0))
        limit = self.cfg.grad_clip or float("inf")

        def step() -> None:
            for _ in range(self.cfg.accumulation_steps):
                (diffusion_loss(model, prepared) / self.cfg.accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(parameters, limit)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def _since(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def read_curves(folder: Path, warm_up: int) -> dict[str, float]:
    """Medians over the measured steps, from the run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = set(events.Tags()["scalars"])
    return {
        name: statistics.median(event.value for event in events.Scalars(name) if event.step > warm_up)
        for name in CURVES
        if name in names
    }


def measure(cfg: TrainOptions, warm_up: int, overhead: bool) -> dict[str, Any]:
    """Train and summarise; see the module."""
    measured = Measured()
    trainer = TimedTrainer(cfg, measured, overhead)
    result: dict[str, Any] = read_curves(trainer.run(), warm_up)
    times = [wall for wall, _ in measured.trainer[warm_up:]]
    result |= {"step_s": statistics.median(times), "step_s_least": min(times), "steps": len(times)}
    if overhead:
        bare = [wall for wall, _ in measured.bare[warm_up:]]
        result |= {"bare_step_s": statistics.median(bare), "bare_step_s_least": min(bare)}
        # Each pair of steps ran one right after the other, so that a busy machine slows both.
        pairs = list(zip(measured.trainer[warm_up:], measured.bare[warm_up:]))
        result["overhead"] = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs) - 1
        # Reading clips in this process (num_workers=0) or waiting for them is the data's time, not the trainer's.
        result["overhead_without_data"] = (1 + result["overhead"]) * (1 - result["data_wait"]) - 1
        if trainer.start.device.type == "cpu":  # processor time does not count what other programs take
            result["overhead_cpu_time"] = statistics.median(ours[1] / theirs[1] for ours, theirs in pairs) - 1
    gpu = trainer.start.device.type == "cuda"
    result["device"] = (
        torch.cuda.get_device_name(trainer.start.device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    )
    return result


def resolve(args: argparse.Namespace, words: Sequence[str], folder: Path) -> TrainOptions:
    """The config to measure: as it is, but without checkpoints, samples and validation, and with its own data if it has
    none."""
    cfg = parse_config([args.config, *words], TrainOptions)
    changes = dict(max_steps=args.warm_up + args.steps, ckpt_every=0, log_every=1, wandb=False, load=None)
    changes.update(outputs=str(folder / "outputs"), exp_name="benchmark", samples=None, validation=None)
    if args.bucket:
        resolution, frames, batch = args.bucket
        changes["bucket_config"] = {resolution: {frames: (1.0, batch)}}
    cfg = load_config(cfg, TrainOptions, changes)
    if not any(word.replace("_", "-").startswith("--dataset.data-path") for word in words):
        multiple = check_config(cfg).inputs.spatial_multiple
        table = draw_clips(folder, dict(cfg.bucket_config or {}), multiple, args.clips)
        cfg = load_config(cfg, TrainOptions, {"dataset.data_path": table})
    return cfg


def bucket(text: str) -> tuple[str, int, int]:
    """RESOLUTION,FRAMES,BATCH of a command line.

    Raises:
        UserError: anything else.
    """
    resolution, *numbers = text.rsplit(",", 2)
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--bucket {text}: expected RESOLUTION,FRAMES,BATCH, such as 256px,33,2")
    return resolution, int(numbers[0]), int(numbers[1])


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="training config")
    parser.add_argument(
        "--steps", type=int, action=Bounded, least=1, most=10**6, default=10, help="optimizer steps to measure"
    )
    parser.add_argument(
        "--warm-up", type=int, action=Bounded, least=0, most=10**6, default=3, help="optimizer steps before that"
    )
    parser.add_argument(
        "--bucket", action=Converted, convert=bucket, help="RESOLUTION,FRAMES,BATCH instead of the config's buckets"
    )
    parser.add_argument(
        "--clips", type=int, action=Bounded, least=1, most=10**5, default=2, help="batches of drawn clips per bucket"
    )
    parser.add_argument("--overhead", action="store_true", help="compare with a bare loop of the same model")
    parser.add_argument("--memory", action="store_true", help="print bytes by part for all engines instead")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    add_overwrite(parser)
    args, words = parser.parse_known_args(argv)
    if args.out:
        check_new(args.out, args.overwrite)
    if args.memory:
        rows = memory_table(parse_config([args.config, *words], TrainOptions))
        widths = [max(map(len, column)) for column in zip(*rows)]
        print("\n".join("  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows))
        return
    with TemporaryFolder() as folder:
        result = measure(resolve(args, words, folder), args.warm_up, args.overhead)
    for name, value in result.items():
        print(f"{name:>18}  {value if isinstance(value, str | int) else f'{value:.4g}'}")
    if args.out is not None:
        write_text(json.dumps(result, indent=2) + "\n", args.out)


if __name__ == "__main__":
    run_main(main)
