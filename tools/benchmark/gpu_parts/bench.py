"""What the parts of the measurement have in common: device, sizes, the time that is left, how a run is measured."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.benchmark.measuring import peak_of, seconds_of
from opensora.diffusion.cards import CONTEXT
from tools.benchmark.cases import Sizes
from tools.benchmark.released import forward_flops, released_sizes

GIB = 2**30
TOY = {
    "256px": Sizes(torch.float32, 256, 1, 2, 16, (2, 4, 6), (32, 32, 32, 32), (5, 16, 24)),
    "768px": Sizes(torch.float32, 256, 1, 2, 16, (2, 8, 12), (32, 32, 32, 32), (5, 32, 48)),
}
Row = dict[str, Any]


@dataclass
class Bench:
    """A measurement.

    Attributes:
        device: where.
        toy: tiny models, to see that everything runs.
        quick: 256px only, and fewer repetitions.
        seconds: time for all of it.
        caps: GB of the cards that runs are held to, one after the other.
        original: checkout of Open-Sora 2.0 to compare with.
        left_out: parts and rows for which there was no time, and parts that failed.
        reserved: seconds of those left that are kept for the parts to come.
        flops: of a forward, by resolution, once they are known.
        started: when.
    """

    device: torch.device
    toy: bool = False
    quick: bool = False
    seconds: float = 480.0
    caps: tuple[int, ...] = ()
    original: Path | None = None
    left_out: list[str] = field(default_factory=list)
    reserved: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def forward_flops(self, resolution: str) -> float:
        """Floating-point operations of a forward."""
        if resolution not in self.flops:
            self.flops[resolution] = float(forward_flops(self.sizes(resolution)))
        return self.flops[resolution]

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self.started)

    @property
    def resolutions(self) -> list[str]:
        """Those to measure."""
        return ["256px"] if self.quick else ["256px", "768px"]

    def sizes(self, resolution: str) -> Sizes:
        """Sizes of models and inputs: the released ones, or toys."""
        return TOY[resolution] if self.toy else released_sizes(resolution)

    def has_time(self, what: str, needed: float) -> bool:
        """Whether ``needed`` seconds (on a GPU) are left besides those that are reserved; says so if not."""
        left = self.left - self.reserved
        if self.toy or left >= needed:
            return True
        self.left_out.append(f"{what}: {left:.0f} s left, about {needed:.0f} s needed")
        return False

    def measure(self, run: Callable[[], Any], repeats: int = 3) -> Row:
        """Median seconds and peak memory of a run after one to warm up; what is too large, or fails, says so."""
        try:
            with peak_of(self.device) as peak:
                run()
            times = [seconds_of(run, self.device) for _ in range(1 if self.toy else repeats)]
        except torch.OutOfMemoryError:
            note = "out of memory"  # its traceback holds on to tensors until here is left
        except Exception as error:  # a kernel that this card or version does not have is a row, no end
            note = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        else:
            return {"median_s": statistics.median(times), "peak_gib": peak[0] / GIB}
        self.clear()
        return {"note": note}

    def clear(self) -> None:
        """Give back what is not in use."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # compiled code holds on to models
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a card that has failed for good; what comes next says so
                torch.cuda.empty_cache()


def filled(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, made on its device and never held in a wider dtype than its own."""
    with torch.device("meta"):
        model = build().to(dtype)
    model = model.to_empty(device=device)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    return model.eval().requires_grad_(False)


def cut(sizes: Sizes, depth: int, depth_single: int) -> Sizes:
    """The same with fewer blocks."""
    return replace(sizes, depth=min(depth, sizes.depth), depth_single=min(depth_single, sizes.depth_single))


def room_of(gigabytes: float) -> float:
    """GiB that a card sold with so many GB leaves to a program."""
    return gigabytes - CONTEXT / GIB


@contextmanager
def memory_cap(device: torch.device, gib: float) -> Iterator[None]:
    """Hold this process to so many GiB of a GPU; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(gib * GIB / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
