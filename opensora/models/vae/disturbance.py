"""Latents that are not quite right, for a decoder to learn to forgive."""

import torch
from torch import Tensor


def disturbed(z: Tensor, most: float, generator: torch.Generator | None = None) -> Tensor:
    """Latents with white noise, of another strength for each sample.

    What a diffusion model makes lies beside what an encoder gives; a decoder that has only seen the latter turns small
    errors into visible ones. Noise on its inputs in training (as the noise conditioning augmentation of cascaded
    diffusion, arXiv:2106.15282, and the noisy latents of arXiv:2510.11690) has it draw the likely picture instead.

    Args:
        z: normalised latents ``[B, C, t, h, w]``.
        most: largest standard deviation of the noise, which is drawn evenly from 0 to it; 0 gives ``z`` itself.
        generator: what draws; its device is where the numbers are drawn.
    """
    if not most:
        return z
    device = generator.device if generator is not None else z.device
    strength = most * torch.rand(len(z), *[1] * (z.ndim - 1), generator=generator, device=device)
    noise = torch.randn(z.shape, generator=generator, device=device)
    return z + (strength * noise).to(z)
