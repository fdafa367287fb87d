"""Sampling of a video in windows, each of which continues from the latents of the one before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.diffusion.kept_latents import KeptLatents
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.solvers import StepCallback
from opensora.diffusion.timing import as_stage
from opensora.diffusion.windows import window_seed
from opensora.utils.logging import get_logger
from opensora.utils.temporary import TemporaryFolder

logger = get_logger(__name__)


class MakeWindow(Protocol):
    """What makes a window of a batch."""

    def __call__(
        self, index: int, plan: SamplePlan, given: Tensor | None, seeds: Sequence[int], on_step: StepCallback | None
    ) -> Tensor:
        """Latents [B, C, t, h, w] of window ``index`` (from 0), all of them.

        Args:
            index: which window.
            plan: of it.
            given: [B, C, overlap, h, w], the end of the video up to here; None for the first window.
            seeds: of its noise, per sample.
            on_step: as in a call of the pipeline.
        """


def texts_of_windows(plan: SamplePlan, texts: Sequence[str], next_texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Texts of a batch for each window, as far as they change; just ``texts`` for a video that is made at once."""
    script = [list(texts)]
    changes = max(map(len, next_texts), default=0)
    for index in range(min(changes, plan.windows.count - 1) if plan.windows is not None else 0):
        script.append([more[index] if index < len(more) else now for now, more in zip(script[-1], next_texts)])
    return script


@contextmanager
def kept_in(folders: Sequence[Path] | None, count: int) -> Iterator[list[Path]]:
    """The folders of a batch of ``count`` samples, temporary ones where none are given."""
    if folders is not None:
        yield list(folders)
        return
    with TemporaryFolder() as folder:
        yield [folder / str(sample) for sample in range(count)]


def sample_windows(
    plan: SamplePlan,
    channels: int,
    folders: Sequence[Path],
    seeds: Sequence[int],
    make: MakeWindow,
    on_step: StepCallback | None = None,
    axis: Axis | None = None,
) -> Tensor:
    """Latents of a batch of long videos; what earlier runs left in their folders is gone on from.

    Args:
        plan: with windows.
        channels: of a latent.
        folders: of each sample's latents.
        seeds: per sample, of the whole video.
        make: makes a window.
        on_step: gets the steps of all windows.
        axis: ranks that make the batch together; those but the first have folders of their own, and get what is in its.

    Returns:
        [B, C, T, h, w] float32 on the CPU; of one sample, mapped from its folder rather than in memory.
    """
    windows, after = plan.windows, plan.after
    assert windows is not None, "a video that is made at once"
    assert after is not None
    kept = [KeptLatents(folder, windows, (channels, *plan.latent_size[1:])) for folder in folders]
    done = _share_done(kept, axis)
    if done:
        logger.info("resuming after window %d of %d", done, windows.count)
    for index in range(done, windows.count):
        given = None
        if index:
            given = torch.stack([each.frames()[:, -windows.overlap :] for each in kept])
        own = [window_seed(seed, index) for seed in seeds]
        latents = make(index, after if index else plan, given, own, as_stage(on_step, index, windows.count))
        for each, sample in zip(kept, latents[:, :, windows.new(index)]):
            each.add(sample)
        del latents
    if len(kept) == 1:
        return kept[0].frames()[None]
    return torch.stack([each.frames() for each in kept])


def _share_done(kept: Sequence[KeptLatents], axis: Axis | None) -> int:
    """Windows that all samples of the batch have on all ranks; those of the first rank are handed on to the others."""
    done = min(each.done for each in kept)
    if axis is not None and axis.size > 1:
        done = collectives.broadcast_object(done, axis)
        for index in range(done):
            _hand_on(kept, index, axis)
    for each in kept:
        each.go_back(done)
    return done


def _hand_on(kept: Sequence[KeptLatents], index: int, axis: Axis) -> None:
    for each in kept:
        content = each.window(index) if axis.first else None
        content = collectives.broadcast_object(content, axis)
        if not axis.first and each.done == index:
            each.add(content)
