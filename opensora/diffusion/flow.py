"""Rectified flow: paths between data and noise, their velocity, and how time is spread.

Time runs from t = 1 (pure noise) to t = 0 (data). Liu et al. 2022 (arXiv:2209.03003) give the straight path, Esser et
al. 2024 (arXiv:2403.03206) the logit-normal times and the shift towards noise for larger latents.
"""

import math
import numbers
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from opensora.utils.errors import UserError

# The shift grows linearly with the tokens of a latent frame: 1 at 256 tokens, 3 at 4096 (and on in both directions).
BASE_TOKENS, BASE_SHIFT = 256, 1.0
MAX_TOKENS, MAX_SHIFT = 4096, 3.0


Times = TypeVar("Times", float, Tensor)


def time_shift(alpha: float, t: Times) -> Times:
    """Move times towards noise: ``alpha t / (1 + (alpha - 1) t)`` (arXiv:2403.03206, eq. 23). 0 and 1 stay put."""
    return alpha * t / (1 + (alpha - 1) * t)


def shift_alpha(image_seq_len: int, num_frames: int, flow_shift: float | None = None) -> float:
    """Strength of the time shift for a latent.

    Args:
        image_seq_len: tokens per latent frame.
        num_frames: latent frames.
        flow_shift: this value instead of the one computed from the sizes (it also replaces the factor for frames).

    Raises:
        UserError: a ``flow_shift`` that is not above 0.
    """
    if flow_shift is not None:
        if not 0 < flow_shift < math.inf:
            raise UserError(f"flow_shift {flow_shift!r}: must be a finite number above 0")
        return flow_shift
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return (BASE_SHIFT + slope * (image_seq_len - BASE_TOKENS)) * math.sqrt(num_frames)


def get_schedule(
    num_steps: int,
    image_seq_len: int,
    num_frames: int,
    shift: bool = True,
    flow_shift: float | None = None,
) -> list[float]:
    """Times of an Euler solver.

    Args:
        num_steps: number of solver steps, at least 1.
        image_seq_len: tokens per latent frame.
        num_frames: latent frames.
        shift: whether to shift the evenly spaced times with :func:`shift_alpha`.
        flow_shift: see :func:`shift_alpha`.

    Returns:
        ``num_steps + 1`` falling values from 1.0 to 0.0.

    Raises:
        UserError: no steps, or a shift that is not above 0.
    """
    if not isinstance(num_steps, numbers.Integral) or num_steps < 1:
        raise UserError(f"num_steps {num_steps!r}: a schedule has 1 step or more")
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    return shifted(times, image_seq_len, num_frames, shift, flow_shift)


def shifted(
    positions: Sequence[float],
    image_seq_len: int,
    num_frames: int,
    shift: bool = True,
    flow_shift: float | None = None,
) -> list[float]:
    """Times at positions in [0, 1]; arguments as of :func:`get_schedule`."""
    if not shift:
        return list(positions)
    alpha = shift_alpha(image_seq_len, num_frames, flow_shift)
    return [time_shift(alpha, t) for t in positions]


def sample_timesteps(
    batch: int,
    image_seq_len: int,
    num_frames: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    flow_shift: float | None = None,
) -> Tensor:
    """Training times: logit-normal, then shifted as in sampling.

    Args:
        batch: number of samples.
        image_seq_len: tokens per latent frame.
        num_frames: latent frames.
        generator: random stream; its device is where the numbers are drawn.
        device: where the result goes (default: where it was drawn).
        flow_shift: see :func:`shift_alpha`.

    Returns:
        float32 [batch] in (0, 1); 1 is noise.
    """
    source = generator.device if generator is not None else (device or "cpu")
    t = torch.sigmoid(torch.randn(batch, generator=generator, device=source))
    return time_shift(shift_alpha(image_seq_len, num_frames, flow_shift), t).to(device or source)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).view(-1, *[1] * (like.dim() - 1))


def interpolate(x_0: Tensor, noise: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """Point of the path at time ``t``: ``(1 - t) x_0 + (1 - (1 - sigma_min)(1 - t)) noise``.

    Args:
        x_0: data, [B, ...].
        noise: standard normal, same shape.
        t: [B]; 0 is data (up to ``sigma_min`` of noise), 1 is noise.
        sigma_min: noise left at t = 0.
    """
    to_data = 1 - _per_sample(t, x_0)
    return to_data * x_0 + (1 - (1 - sigma_min) * to_data) * noise


def velocity(x_0: Tensor, noise: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """Derivative of :func:`interpolate` by ``t``: what the model learns. Same shape as ``x_0``."""
    return (1 - sigma_min) * noise - x_0


def flow_matching_loss(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Mean squared error in float32.

    Args:
        pred: predicted velocity, tokens [B, L, C] (any shape without ``mask``).
        target: true velocity, same shape.
        mask: [B, L], true for the tokens that count. Each sample then weighs the same, whatever number of its tokens
            count. :func:`unconditioned_tokens` makes such a mask.
        weights: [B], the errors of the samples are multiplied by them; the mean is over B, whatever their sum.

    Returns:
        Scalar.
    """
    if mask is None and weights is None:
        return (pred.float() - target.float()).square().mean()
    per_sample = sample_errors(pred, target, mask)
    return (per_sample if weights is None else per_sample * weights.to(per_sample)).mean()


def sample_errors(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, float32 [B]; arguments as of :func:`flow_matching_loss`."""
    error = (pred.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    keep = mask.to(error)
    return (error.mean(-1) * keep).sum(1) / keep.sum(1).clamp(min=1)


def unconditioned_tokens(condition_mask: Tensor, tokens_per_frame: int) -> Tensor:
    """Which tokens to learn from when given first and last frames should not count in the loss.

    A first or last latent frame that is given as a condition is left out, since the model only has to copy it. A
    sample with a condition on any inner frame (video to video) counts whole, and so does one that would keep nothing.

    Args:
        condition_mask: [B, T], or [B, 1, T, h, w] as :func:`opensora.diffusion.conditions.build_condition` makes it
            (channel 0), or [B, T, h, w]; 1 on given frames.
        tokens_per_frame: tokens of one latent frame after packing.

    Returns:
        bool [B, T * tokens_per_frame] for :func:`flow_matching_loss`.
    """
    given = condition_mask.bool()
    if given.dim() == 5:
        given = given[:, 0]
    if given.dim() == 4:
        given = given[:, :, 0, 0]
    keep = torch.ones_like(given)
    keep[:, 0] = ~given[:, 0]
    keep[:, -1] &= ~given[:, -1]
    whole = given[:, 1:-1].any(1) | ~keep.any(1)
    keep |= whole[:, None]
    return keep.repeat_interleave(tokens_per_frame, dim=1)
