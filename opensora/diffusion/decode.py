"""Latents to pixels, one sample at a time and frames as they are done, in tiles that fit into the memory there is."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opensora.acceleration.memory import room_on
from opensora.acceleration.parallel_vae import together
from opensora.diffusion.finite import check_result
from opensora.models.autoencoder import Autoencoder
from opensora.models.vae.fitting import fit_tiling, smaller
from opensora.models.vae.tiling import Tiling
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.sizes import size_text
from opensora.utils.video import to_uint8

logger = get_logger(__name__)

WINDOW_FADE = 0.25  # share of a window over which the decoded video goes over from one to the next


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


class FrameSink(Protocol):
    """Where decoded frames go."""

    def start(self, sample: int) -> None:
        """The first frames of a sample of the batch follow; what came of it before is void."""

    def write(self, frames: np.ndarray) -> None:
        """Further frames of the sample, uint8 [T, H, W, 3]."""


class Gathered:
    """Keeps all frames.

    Attributes:
        parts: of each sample, in order.
    """

    def __init__(self) -> None:
        self.parts: dict[int, list[np.ndarray]] = {}

    def start(self, sample: int) -> None:
        """See :class:`FrameSink`."""
        self.parts[sample] = []

    def write(self, frames: np.ndarray) -> None:
        """See :class:`FrameSink`."""
        self.parts[max(self.parts)].append(frames)

    def videos(self) -> list[np.ndarray]:
        """uint8 [num_frames, H, W, 3] of each sample."""
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in self.parts.values()]


class Dropped:
    """Keeps nothing: another process writes what this one helps to decode."""

    def start(self, sample: int) -> None:
        """See :class:`FrameSink`."""

    def write(self, frames: np.ndarray) -> None:
        """See :class:`FrameSink`."""


@torch.no_grad()
def decode_into(
    sink: FrameSink,
    ae: Autoencoder,
    latents: Tensor,
    frames: slice,
    device: torch.device,
    dtype: torch.dtype,
    room: int | None = None,
    window: int | None = None,
) -> str:
    """Decode latents [B, C, T, h, w]; frames are handed on as soon as their tiles of time are done.

    Args:
        sink: gets the frames, sample by sample.
        ae: autoencoder on ``device``.
        latents: any dtype, on any device.
        frames: which frames of the decoded video to keep.
        device: where to work.
        dtype: of the autoencoder.
        room: bytes of the device's memory that decoding may take; None: tiles are those of the config.
        window: frames that are decoded together, of a video that was made in windows of so many: no more of it is on
            the device or in memory, however long it is. None: what the tiles say.

    Returns:
        The tiles, in words, if they are not those of the config; else "".

    Raises:
        DecodeMemoryError: neither at once nor in tiles is there memory for it, on this rank or another one that shares
            the tiles.
        NotFiniteError: latents or pixels that are no numbers.
    """
    changed = ""
    for sample, latent in enumerate(latents.split(1)):
        spans = None if window is None else _in_time(ae, window)
        if spans is None:  # else looked at window by window
            check_result(latent, "latents to decode", "to sample them again")
        size = latent.shape[2:] if spans is None else torch.Size(spans.largest(latent.shape[2:]))
        for tiling in _tilings(ae, size, dtype, room):
            try:
                with ae.in_tiles(tiling), together(ae):
                    sink.start(sample)
                    if spans is None:
                        parts = ae.decode_parts(latent.to(device, dtype))
                    else:
                        parts = spans.decode_parts(latent, lambda span: ae.decode(span.to(device, dtype)))
                    _decode(sink, parts, frames)
            except torch.OutOfMemoryError as error:
                reason = error.with_traceback(None)  # which would hold all tensors of the attempt
                continue
            changed = tiling.describe() if tiling is not None and tiling != ae.tiling else changed
            break
        else:
            raise DecodeMemoryError(
                "not enough memory to decode, even in tiles; free memory on the device, or try --offload True or a "
                "smaller --ae.sample_size",
                latents.float().cpu(),
                frames,
            ) from reason
    return changed


def _tilings(ae: Autoencoder, size: torch.Size, dtype: torch.dtype, room: int | None) -> Iterator[Tiling | None]:
    """What to try one after the other, as long as memory runs out."""
    tiling = fitting_tiles(ae, size, dtype, room)
    yield tiling
    logger.warning("not enough memory to decode at once, trying in tiles")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with ae.in_tiles(tiling), ae.tiled():
        tiling = ae.tiling
    yield tiling
    if tiling is None or room is None:
        return
    for other in smaller(tiling, size):
        if 2 * other.volume(size) <= tiling.volume(size):
            logger.warning("not enough memory to decode, trying %s", other.describe())
            tiling = other
            yield tiling


def fitting_tiles(
    ae: Autoencoder, size: torch.Size, dtype: torch.dtype, room: int | None, encode: bool = False
) -> Tiling | None:
    """Tiles for a latent of size (t, h, w), or with ``encode`` for a clip (T, H, W): those of the config, or if they do
    not fit into ``room`` bytes, smaller ones, which the log names. None where there are none to choose."""
    if ae.tiling is None or room is None:
        return ae.tiling

    def count(tiling: Tiling) -> int | None:
        with ae.in_tiles(tiling):
            cost = ae.encode_cost(size, dtype) if encode else ae.decode_cost(size, dtype)
        return None if cost is None else int(cost.peak)

    fit = fit_tiling(ae.tiling, ae.get_latent_size(size) if encode else size, room, count)
    what = "encoding" if encode else "decoding"
    if fit.changed:
        logger.info(
            "%s in %s instead of %s, which needs more than the %s that are free: pixels differ a little",
            *(what, fit.tiling.describe(), ae.tiling.describe(), size_text(room)),
        )
    if not fit.fits:
        needed = size_text(fit.bytes or 0)
        logger.warning("%s takes about %s in the smallest tiles, and %s are free", what, needed, size_text(room))
    return fit.tiling


def room_to_work(device: torch.device, limit: int | None) -> int | None:
    """Bytes for tiles to be chosen by: what is free on a GPU, or of ``limit``; None on a CPU, where it cannot be told
    what is."""
    return room_on(device, limit) if device.type == "cuda" else None


def _in_time(ae: Autoencoder, window: int) -> Tiling:
    """Tiles of time as long as a window, each faded into from the one before: for the decoder a long video is a clip of
    a window's length. The tiles of the autoencoder itself divide these further, where they are to."""
    ratio = ae.compression[0]
    frames = max((window - int(ae.is_causal)) // ratio, 1) * ratio
    return Tiling(ae.compression, ae.is_causal, math.lcm(*ae.compression[1:]), frames, WINDOW_FADE, use_temporal=True)


def window_work(ae: Autoencoder, window: int, size: Sequence[int]) -> float:
    """What decoding a latent (t, h, w) in windows takes, over that of one window."""
    spans = _in_time(ae, window)
    return spans.work(size) * size[0] / spans.largest(size)[0]


def _decode(sink: FrameSink, parts: Iterator[Tensor], frames: slice) -> None:
    begin = 0
    for pixels in parts:
        check_pixels(pixels)
        kept = slice(max(frames.start - begin, 0), max(frames.stop - begin, 0))
        begin += pixels.shape[2]
        if pixels[:, :, kept].numel():
            sink.write(to_uint8(pixels[0, :, kept]))
        del pixels  # not held while the next part is made


def check_pixels(pixels: Tensor) -> None:
    """Refuse decoded pixels [B, 3, T, H, W] that are not finite.

    Raises:
        NotFiniteError: says what to try.
    """
    dtype = str(pixels.dtype).removeprefix("torch.")
    check_result(pixels, f"pixels decoded in {dtype}", "--dtype bf16 or fp32, or other weights of the autoencoder")
