"""What a call of the pipeline gives, and what it calls on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from opensora.diffusion.decode import FrameSink
from opensora.diffusion.kept_pixels import KeptRegion
from opensora.diffusion.plan import SamplePlan

ImagesCallback = Callable[[list[np.ndarray]], None]
"""``on_images(images)``: called with the pictures uint8 [H, W, 3] that a batch of videos is to start from."""


@dataclass
class SampleResult:
    """What a call of the pipeline made, per sample of the batch.

    Attributes:
        latents: [B, C, T, h, w] float32 on the CPU.
        frames: uint8 arrays [num_frames, H, W, 3].
        texts: prompts as the text encoders got them.
        seeds: of the starting noise.
        timings: seconds by stage: ``image``, ``text``, ``references``, ``denoise``, ``decode`` (with writing, where
            frames go to files).
        plan: sizes and schedule.
        images: uint8 [H, W, 3], pictures made first from the prompts (``use_t2i2v``), else empty.
        reused: share of the transformer's evaluations in which the step cache left blocks out; empty without one that
            counts them.
        tiles: those that were decoded in, in words, where they are not the config's.
        kept: what was kept of each sample's region, for decoding; empty where none has one.
    """

    latents: Tensor
    frames: list[np.ndarray]
    texts: list[str]
    seeds: list[int]
    timings: dict[str, float]
    plan: SamplePlan
    images: list[np.ndarray] = field(default_factory=list)
    reused: list[float] = field(default_factory=list)
    tiles: str = ""
    kept: list[KeptRegion | None] = field(default_factory=list)


SampledCallback = Callable[[SampleResult], FrameSink]
"""``on_sampled(result)``: called with all but the frames of a batch, gives where those go."""
