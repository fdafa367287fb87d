"""Small clips as people have them, drawn for the tests of the media reader."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

HEIGHT, WIDTH = 96, 160
BARS = np.array(  # of 20 px
    [
        (200, 40, 40),
        (40, 200, 40),
        (40, 40, 200),
        (200, 200, 40),
        (40, 200, 200),
        (200, 40, 200),
        (120,) * 3,
        (235,) * 3,
    ],
    np.uint8,
)


def scene(count: int = 12, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Colour bars with a white square that walks along the top: uint8 [T, H, W, 3]; no two corners alike."""
    frames = np.repeat(BARS, -(-width // len(BARS)), axis=0)[None, None, :width].repeat(height, 1).repeat(count, 0)
    frames[:, height * 3 // 4 :] = 0
    for t in range(count):
        frames[t, 4:20, (4 * t) % (width - 16) : (4 * t) % (width - 16) + 16] = 255
    return np.ascontiguousarray(frames)


def numbered(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Grey frames of which each is brighter than the one before."""
    grey = np.linspace(20, 235, count).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey[:, None, None, None], (count, height, width, 3)))


def numbers_of(frames: np.ndarray, count: int) -> list[int]:
    """Which of :func:`numbered` frames are what they look like."""
    return np.abs(frames.mean(axis=(1, 2, 3))[:, None] - np.linspace(20, 235, count)).argmin(axis=1).tolist()


def write_clip(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: Fraction | int = 24,
    times: Sequence[int] | None = None,
    matrix: Colorspace = Colorspace.ITU601,
    full: bool = False,
    tags: dict[str, int] | None = None,
    container: dict[str, Any] | None = None,
    options: dict[str, str] | None = None,
    turned: tuple[int, bool, bool] | None = None,
) -> Path:
    """Encode frames (uint8, or uint16 of 16 bits), without any tags but the given ones.

    Args:
        times: of each frame, in frames of ``rate``.
        turned: degrees counter-clockwise to be turned by when shown, then mirrored left to right, upside down.
    """
    convert = VideoReformatter()
    with av.open(str(path), "w", **(container or {})) as target:
        stream = target.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.options = options or {}
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if turned is not None:
            stream.set_display_rotation(*turned)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.dtype == np.uint8 else "rgb48le")
            if not pixels.startswith(("rgb", "gbr", "bgr", "pal")):
                levels = ColorRange.JPEG if full else ColorRange.MPEG
                frame = convert.reformat(frame, format=pixels, dst_colorspace=matrix, dst_color_range=levels)
            if times is not None:
                frame.pts = times[number]
                frame.time_base = 1 / Fraction(rate)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def edited(source: Path, target: Path, start: int, length: int) -> Path:
    """A copy of an mp4 whose edit list shows ``length`` frames from frame ``start`` on, in place of the one it has."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        tick = int(1 / (stream.average_rate * stream.time_base))
    at = data.index(b"elst")
    assert int.from_bytes(data[at + 8 : at + 12], "big") == 1  # one entry
    first = int.from_bytes(data[at + 16 : at + 20], "big")
    data[at + 12 : at + 16] = round(length * 1000 / 24).to_bytes(4, "big")  # in ticks of the film, 1000 a second
    data[at + 16 : at + 20] = (first + start * tick).to_bytes(4, "big")
    target.write_bytes(data)
    return target


def see_through(count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A :func:`scene` with a hole and a veil (uint8 [T, H, W, 4]), and what it is on white (uint8 [T, H, W, 3])."""
    rgb = scene(count)
    alpha = np.full((*rgb.shape[:3], 1), 255, np.uint8)
    alpha[:, 30:60, 40:120] = 0
    alpha[:, 60:70] = 128
    white = np.round(rgb * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).astype(np.uint8)
    return np.concatenate([rgb, alpha], axis=-1), white


def write_see_through(path: Path, frames: np.ndarray, codec: str, pixels: str, **options: str) -> Path:
    """Encode frames with transparency."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.options = options
        for picture in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixels)))
        target.mux(stream.encode())
    return path
