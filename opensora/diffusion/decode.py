"""Latents to pixels, one sample at a time, in tiles if memory is short; and kept latents to video files."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.diffusion.finite import check_result
from opensora.models.autoencoder import Autoencoder
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.video import to_uint8

logger = get_logger(__name__)


class DecodeMemoryError(UserError):
    """Decoding ran out of memory.

    Attributes:
        latents: [B, C, T, h, w], what was sampled.
        frames: which frames of the decoded video are to be kept.
        result: all that a pipeline had when it came to decoding (:class:`opensora.diffusion.pipeline.SampleResult`).
    """

    result: Any = None

    def __init__(self, message: str, latents: Tensor, frames: slice) -> None:
        super().__init__(message)
        self.latents = latents
        self.frames = frames


@torch.no_grad()
def decode_latents(
    ae: Autoencoder, latents: Tensor, frames: slice, device: torch.device, dtype: torch.dtype
) -> list[np.ndarray]:
    """Latents [B, C, T, h, w] to uint8 videos [num_frames, H, W, 3].

    Args:
        ae: autoencoder on ``device``.
        latents: any dtype, on any device.
        frames: which frames of the decoded video to keep.
        device: where to work.
        dtype: of the autoencoder.

    Raises:
        DecodeMemoryError: neither at once nor in tiles is there memory for it.
        NotFiniteError: latents or pixels that are no numbers.
    """
    videos = []
    for latent in latents.split(1):
        check_result(latent, "latents to decode", "to sample them again")
        try:
            pixels = _decode_or_tile(ae, latent.to(device, dtype))
        except torch.OutOfMemoryError as error:
            raise DecodeMemoryError(
                "not enough memory to decode, even in tiles; free memory on the device, or try --offload True or a "
                "smaller --ae.sample_size",
                latents.float().cpu(),
                frames,
            ) from error
        check_pixels(pixels)
        videos.append(to_uint8(pixels[0][:, frames]))
    return videos


def check_pixels(pixels: Tensor) -> None:
    """Refuse decoded pixels [B, 3, T, H, W] that are not finite.

    Raises:
        NotFiniteError: says what to try.
    """
    dtype = str(pixels.dtype).removeprefix("torch.")
    check_result(pixels, f"pixels decoded in {dtype}", "--dtype bf16 or fp32, or other weights of the autoencoder")


def _decode_or_tile(ae: Autoencoder, latent: Tensor) -> Tensor:
    try:
        return ae.decode(latent)
    except torch.OutOfMemoryError:
        logger.warning("not enough memory to decode at once, trying in tiles")
    if latent.is_cuda:
        torch.cuda.empty_cache()
    with ae.tiled():
        return ae.decode(latent)
