"""Step callbacks on their way through the stages of a pipeline, and the time those take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opensora.diffusion.latents import unpack
from opensora.diffusion.solvers import StepCallback


def with_latents(on_step: StepCallback | None, size: tuple[int, int, int], patch_size: int) -> StepCallback | None:
    """The callback, given latents [B, C, T, h, w] where the solver has tokens."""
    if on_step is None:
        return None
    callback = on_step
    return lambda step, total, tokens: callback(step, total, unpack(tokens, size, patch_size))


def as_stage(on_step: StepCallback | None, stage: int, stages: int) -> StepCallback | None:
    """The callback for one of several runs of equal length (``stage`` from 0), counting steps over all of them."""
    if on_step is None:
        return None
    callback = on_step
    return lambda step, total, latents: callback(step + stage * total, total * stages, latents)


@contextmanager
def timed(timings: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Add the seconds of the block, work queued on the device included, to ``timings[stage]``."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start
