"""Latents as noise, as a token sequence, and the positions of those tokens."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from opensora.utils.errors import UserError


def get_noise(
    seeds: Sequence[int],
    channels: int,
    latent_size: tuple[int, int, int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Starting noise of a batch, one random stream per sample.

    Each sample is drawn from its own generator on the CPU in float32 and then moved, so it depends on its seed and
    size alone: not on the batch it is in, the device or the dtype.

    Args:
        seeds: one per sample, 0 <= seed < 2**64.
        channels: latent channels C of the autoencoder.
        latent_size: (T, h, w) latent frames, rows and columns.
        device: where the result goes.
        dtype: of the result.

    Returns:
        [B, C, T, h, w], standard normal.
    """
    samples = [
        torch.randn(channels, *latent_size, generator=torch.Generator("cpu").manual_seed(int(seed))) for seed in seeds
    ]
    return torch.stack(samples).to(device=device, dtype=dtype)


def pack(x: Tensor, patch_size: int = 2) -> Tensor:
    """Latents [B, C, T, h, w] to tokens [B, T*(h/p)*(w/p), C*p*p].

    Raises:
        UserError: another number of dimensions, or h or w that do not divide by the patch size p.
    """
    if x.ndim != 5 or patch_size < 1 or x.shape[-2] % patch_size or x.shape[-1] % patch_size:
        raise UserError(
            f"latents {[*x.shape]} in patches of {patch_size!r}: give [B, C, T, h, w] of which h and w divide by the "
            "patch size"
        )
    return rearrange(x, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=patch_size, pw=patch_size)


def unpack(
    x: Tensor,  # [B, T*(h/p)*(w/p), C*p*p]
    latent_size: tuple[int, int, int],
    patch_size: int = 2,
) -> Tensor:
    """Inverse of :func:`pack`: tokens to latents [B, C, T, h, w], where ``latent_size`` = (T, h, w).

    Raises:
        UserError: tokens of another number, or that are not of patches of this size.
    """
    frames, height, width = latent_size
    count = frames * (height // patch_size) * (width // patch_size)
    if x.ndim != 3 or x.shape[1] != count or x.shape[2] % patch_size**2:
        raise UserError(
            f"tokens {[*x.shape]} of latents {tuple(latent_size)} in patches of {patch_size!r}: expected "
            f"[B, {count}, C * {patch_size**2}]"
        )
    return rearrange(
        x,
        "b (t h w) (c ph pw) -> b c t (h ph) (w pw)",
        t=frames,
        h=height // patch_size,
        w=width // patch_size,
        ph=patch_size,
        pw=patch_size,
    )


def prepare_ids(
    batch: int,
    latent_size: tuple[int, int, int],
    patch_size: int,
    txt_len: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Positions for the rotary embedding.

    Args:
        batch: B.
        latent_size: (T, h, w) before packing.
        patch_size: patch edge of :func:`pack`.
        txt_len: text tokens L_txt.
        device: where the result goes.
        dtype: of the result; positions are whole numbers.

    Returns:
        img_ids [B, T*(h/p)*(w/p), 3] holding (frame, row, column) of each token in the order of :func:`pack`, and
        txt_ids [B, L_txt, 3], all zero.
    """
    frames, height, width = latent_size[0], latent_size[1] // patch_size, latent_size[2] // patch_size
    axes = [torch.arange(n, device=device, dtype=dtype) for n in (frames, height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    img_ids = grid.reshape(1, -1, 3).repeat(batch, 1, 1)
    return img_ids, torch.zeros(batch, txt_len, 3, device=device, dtype=dtype)
