"""Diffusion times that training draws, and weights of the loss over them, by name.

One of a user's own is a function with the arguments of these, registered with ``TIME_SAMPLINGS.register("name")`` or
``LOSS_WEIGHTINGS.register("name")`` of :mod:`opensora.config.choices`. Time 1 is noise, 0 is data.
"""

import math

import torch
from torch import Generator, Tensor

from opensora.config.choices import LOSS_WEIGHTINGS, TIME_SAMPLINGS
from opensora.config.options import LossWeightingOptions, TimeSamplingOptions
from opensora.diffusion.flow import shift_alpha, time_shift

SMALLEST_TIME = 1e-3  # of weights that grow without bounds towards data


def draw_times(
    batch: int, image_seq_len: int, num_frames: int, options: TimeSamplingOptions, generator: Generator
) -> Tensor:
    """Training times of a batch, by default those of :func:`opensora.diffusion.flow.sample_timesteps`.

    Args:
        batch: number of samples.
        image_seq_len: tokens per latent frame.
        num_frames: latent frames.
        options: density and shift.
        generator: random stream; the times are on its device.

    Returns:
        float32 [batch] in [0, 1].
    """
    t = TIME_SAMPLINGS.get(options.name)(batch, options, generator)
    return time_shift(shift_alpha(image_seq_len, num_frames, options.flow_shift), t) if options.shift else t


def logit_normal(batch: int, options: TimeSamplingOptions, generator: Generator) -> Tensor:
    """Times whose logit is normal with ``mean`` and ``width`` (arXiv:2403.03206, eq. 19): float32 [batch] in (0, 1)."""
    normal = torch.randn(batch, generator=generator, device=generator.device)
    return torch.sigmoid(options.mean + options.width * normal)


def uniform(batch: int, options: TimeSamplingOptions, generator: Generator) -> Tensor:
    """All times alike: float32 [batch] in (0, 1]."""
    return 1 - torch.rand(batch, generator=generator, device=generator.device)


def mode(batch: int, options: TimeSamplingOptions, generator: Generator) -> Tensor:
    """Mode sampling with heavy tails (arXiv:2403.03206, eq. 20): float32 [batch] in [0, 1]. ``mode_scale`` 0 is
    uniform."""
    u = torch.rand(batch, generator=generator, device=generator.device)
    return (1 - u - options.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)).clamp(0, 1)


def time_weights(t: Tensor, options: LossWeightingOptions) -> Tensor | None:
    """Weights over the time ``t`` [B] of the squared error of the velocity; None where all are 1."""
    return LOSS_WEIGHTINGS.get(options.time)(t, options) if options.time is not None else None


def cosmap(t: Tensor, options: LossWeightingOptions) -> Tensor:
    """As if uniform times were drawn where the log-SNR is that of the cosine schedule (arXiv:2403.03206, eq. 21): its
    density, ``2 / (pi - 2 pi t + 2 pi t^2)``, whose mean over uniform times is 1."""
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


def min_snr(t: Tensor, options: LossWeightingOptions) -> Tensor:
    """Min-SNR-gamma (arXiv:2303.09556): ``min(SNR, gamma)`` of the squared error of the data. The velocity's is
    ``1 / t^2`` of that, and the SNR is ``(1 - t)^2 / t^2``: ``min((1 - t)^2, gamma t^2)``."""
    return torch.minimum((1 - t).square(), options.gamma * t.square())


def sigma_sqrt(t: Tensor, options: LossWeightingOptions) -> Tensor:
    """``1 / t^2``, which stresses times near the data (diffusers' name for it); held constant below 0.001."""
    return t.clamp(min=SMALLEST_TIME).square().reciprocal()
