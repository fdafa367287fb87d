"""Writing of images and videos, and reading them, which is :mod:`opensora.utils.media`. PyAV is the only video codec in
use, Pillow the only image one."""

import math
import numbers
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files import REFUSED, FileBeside, check_new, write_beside, write_text
from opensora.utils.media.frames import read_clip as read_video
from opensora.utils.media.kinds import kind_of
from opensora.utils.media.pictures import read_picture as read_image
from opensora.utils.media.pixels import tag_bt709, to_bt709
from opensora.utils.media.probe import probe
from opensora.utils.paths import is_file

__all__ = [
    "IMAGE_EXTENSIONS",
    "SAME_EVERYWHERE",
    "VIDEO_EXTENSIONS",
    "VideoInfo",
    "VideoWriter",
    "contact_sheet",
    "is_video",
    "read_image",
    "read_video",
    "save_image",
    "save_video",
    "to_uint8",
    "video_info",
    "write_beside",
    "write_text",
]

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# x264 makes the same file of the same frames on every processor. Without it, its routines for AVX-512 read memory
# that nobody wrote (core 165), and each run gave another file.
SAME_EVERYWHERE = {"x264-params": "cpu-independent=1"}
LEAST_FPS, MOST_FPS = 1e-3, 100_000  # of what containers and players know as rates
WORST_CRF = 51
NO_FILE = 1  # FFmpeg's AVFMT_NOFILE: a format that opens its files itself
MOST_SIDE = 16_384  # of x264
MOST_TIMES = 64  # that pixels of a contact sheet are enlarged
NO_VIDEO = "{path}: '{ending}' is the ending of no video file; give .mp4"
VIDEO_EXTENSIONS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True)
class VideoInfo:
    """What a reader makes of a video: frames that are decoded, upright size, mean rate."""

    num_frames: int
    height: int
    width: int
    fps: float


def is_video(path: str | Path) -> bool:
    """Whether a file is a clip, by its content; by its ending where that says nothing, for the message to fit."""
    kind = kind_of(path)
    return Path(path).suffix.lower() in VIDEO_EXTENSIONS if kind is None else kind == "clip"


def to_uint8(video: Tensor) -> np.ndarray:
    """Decoded pixels to displayable ones.

    Args:
        video: [3, T, H, W] in [-1, 1] (values outside are clipped).

    Returns:
        uint8 array [T, H, W, 3], rounded to the nearest level.
    """
    pixels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).add(0.5)
    return pixels.byte().permute(1, 2, 3, 0).cpu().numpy()


def _as_frames(frames: np.ndarray | Tensor, ndim: int) -> np.ndarray:
    if isinstance(frames, Tensor):
        if frames.is_meta:
            raise UserError("expected uint8 pixels, got a tensor on meta, which has none")
        frames = frames.detach().cpu().numpy()
    array = np.asarray(frames)
    if array.ndim != ndim or array.shape[-1] != 3 or array.dtype != np.uint8:
        shape = "[T, H, W, 3]" if ndim == 4 else "[H, W, 3]"
        raise UserError(f"expected uint8 pixels {shape}, got {array.dtype} {list(array.shape)}")
    return array


def save_video(frames: np.ndarray | Tensor, path: str | Path, fps: float, crf: int = 23) -> Path:
    """Write an h264 (yuv420p) video that any player opens, tagged as what it is: the limited range of BT.709.

    Args:
        frames: uint8 [T, H, W, 3]. Odd heights and widths, which yuv420p cannot hold, get their last row or column
            repeated once.
        path: target; its ending chooses the container (``.mp4`` normally).
        fps: frames per second, > 0.
        crf: constant rate factor of x264: 0 lossless, 23 default, 51 worst.

    Returns:
        The path written.

    Raises:
        UserError: other pixels, none, a rate that cannot be, or an ending that is no container's.
    """
    array = _as_frames(frames, 4)
    if not array.size:
        raise UserError(f"{path}: a video needs at least one frame, and pixels in it; got {list(array.shape)}")
    writer = VideoWriter(path, fps, crf)
    try:
        writer.write(array)
        return writer.put_in_place()
    except BaseException:
        writer.discard()
        raise


class VideoWriter:
    """What :func:`save_video` does, with frames that come in parts: the file is the same, whatever the parts.

    Its last word is :meth:`put_in_place` or :meth:`discard`; until then there is no file of this name.

    Args:
        path, fps, crf: as there.

    Raises:
        UserError: a rate that cannot be.
    """

    def __init__(self, path: str | Path, fps: float, crf: int = 23) -> None:
        if not isinstance(fps, numbers.Real) or isinstance(fps, bool) or not 0 < fps < math.inf:
            raise UserError(f"{path}: fps {fps!r} must be a number above 0")
        if not LEAST_FPS <= fps <= MOST_FPS:
            raise UserError(f"{path}: fps {fps!r} must be from {LEAST_FPS} to {MOST_FPS:,}")
        if not isinstance(crf, numbers.Real) or isinstance(crf, bool) or not 0 <= crf <= WORST_CRF:
            raise UserError(f"{path}: crf {crf!r} must be a number from 0 (lossless) to {WORST_CRF} (worst)")
        self._file: FileBeside = FileBeside(path)
        self.path: Path = self._file.path
        self.fps: float = float(fps)
        self.crf: int = crf
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._convert: VideoReformatter = VideoReformatter()

    def write(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3], all of one size.

        Raises:
            UserError: other pixels, or an ending that is no container's.
        """
        height, width = _as_frames(frames, 4).shape[1:3]
        if max(height, width) > MOST_SIDE:
            raise UserError(f"{self.path}: frames of {width} x {height} pixels; h264 takes sides up to {MOST_SIDE:,}")
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._container = _open_to_write(self._file.temporary, named=self.path)
            self._stream = self._video_stream(self._container, *frames.shape[1:3])
        assert self._stream is not None
        with self._named():
            for frame in frames:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                self._container.mux(self._stream.encode(to_bt709(rgb, self._convert)))

    def _video_stream(self, container: OutputContainer, height: int, width: int) -> VideoStream:
        try:
            stream = container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(65535))
        except ValueError:  # one for pictures or sound
            raise UserError(NO_VIDEO.format(path=self.path, ending=self.path.suffix)) from None
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(self.crf), **SAME_EVERYWHERE}
        tag_bt709(stream.codec_context)
        return stream

    def put_in_place(self) -> Path:
        """Finish the video and give it its name; returns that."""
        assert self._container is not None, "no frames"
        assert self._stream is not None
        with self._named():
            self._container.mux(self._stream.encode())
            self._close()
        return self._file.put_in_place()

    def discard(self) -> None:
        """Leave nothing of it."""
        try:
            with suppress(OSError, av.FFmpegError):  # what is left to write has no room either
                self._close()
        finally:
            self._file.discard()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of a disk that takes nothing more are about the file, not about its temporary name."""
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            number = getattr(error, "errno", None)
            if number not in REFUSED:
                raise
            raise OSError(number, os.strerror(number), str(self.path)) from error

    def _close(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()


def _open_to_write(path: Path, named: str | Path) -> OutputContainer:
    try:
        container = av.open(str(path), "w")
    except ValueError:  # the library's word for an ending that it does not know
        raise UserError(NO_VIDEO.format(path=named, ending=path.suffix)) from None
    if container.format.flags & NO_FILE:  # a playlist, whose pieces would lie beside it
        raise UserError(NO_VIDEO.format(path=named, ending=path.suffix))
    return container


def save_image(frame: np.ndarray | Tensor, path: str | Path) -> Path:
    """Write one uint8 frame [H, W, 3]; the ending of ``path`` chooses the format.

    Raises:
        UserError: other pixels, or an ending that is no picture's.
    """
    array = _as_frames(frame, 3)
    if not array.size:
        raise UserError(f"{path}: a picture needs pixels; got {list(array.shape)}")
    check_new(path)
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{path}: '{Path(path).suffix}' is the ending of no picture file; give .png")
    return _write_picture(Image.fromarray(array), path)


def _write_picture(image: Image.Image, path: str | Path) -> Path:
    try:
        return write_beside(path, image.save)
    except (OSError, ValueError, OverflowError, struct.error) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
            raise
        size = f"{image.width} x {image.height} pixels"  # too many for this format, to all that is known
        raise UserError(f"{path}: a picture of {size} cannot be written as such a file; give .png") from error


def video_info(path: str | Path) -> VideoInfo:
    """Size, rate and number of frames of a video, as :func:`read_video` finds them; at most one frame is decoded where
    the header can be believed.

    Raises:
        UserError: the file is missing or holds no video.
    """
    if not is_file(path):
        raise UserError(f"video not found: {path}")
    info = probe(path)
    if info.kind != "clip":
        raise UserError(f"not a readable video: {path} (a picture)")
    return VideoInfo(info.num_frames, info.height, info.width, info.fps)


def contact_sheet(
    videos: Sequence[np.ndarray | Tensor],
    path: str | Path,
    frames: int = 5,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    columns: int = 1,
    gap: int = 4,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Path:
    """Lay frames of several videos out on one picture, a strip per video with its label above.

    Args:
        videos: uint8 arrays [T, H, W, 3]; their sizes may differ.
        path: picture to write.
        frames: frames per strip, evenly spaced from first to last.
        labels: one line of text per video.
        scale: whole-number enlargement of the pixels.
        columns: strips side by side.
        gap: pixels between frames and strips.
        background: RGB of the sheet; text is black.

    Raises:
        UserError: no video, a label too few or too many, or a number of frames, columns or times out of range.
    """
    bounds = ((frames, 1, math.inf), (columns, 1, MOST_SIDE), (scale, 1, MOST_TIMES), (gap, 0, MOST_SIDE))
    fits = all(isinstance(number, int) and least <= number <= most for number, least, most in bounds)
    if not fits or (labels and len(labels) != len(videos)):
        raise UserError(
            f"a contact sheet of {len(videos)} videos: frames={frames}, columns={columns}, scale={scale}, "
            f"gap={gap} and {len(labels or ())} labels; give whole numbers of 1 or more, a "
            f"scale of at most {MOST_TIMES}, a label per video"
        )
    if any(not _as_frames(video, 4).size for video in videos):
        raise UserError("a contact sheet of a video without frames")
    labels = [" ".join(str(label).split()) for label in labels or ()]  # in one line each
    strips = [_strip(_as_frames(video, 4), frames, scale, gap, background) for video in videos]
    if not strips:
        raise UserError("a contact sheet needs at least one video")
    font = ImageFont.load_default(size=12)
    label_height = 16 if labels else 0
    label_widths = [int(font.getlength(label)) for label in labels or ()]
    cell_width = max([strip.width for strip in strips] + label_widths) + gap
    cell_height = max(strip.height for strip in strips) + label_height + gap
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (cell_width * columns + gap, cell_height * rows + gap), background)
    draw = ImageDraw.Draw(sheet)
    for index, strip in enumerate(strips):
        x, y = gap + index % columns * cell_width, gap + index // columns * cell_height
        if labels:
            draw.text((x, y), labels[index], fill=(0, 0, 0), font=font)
        sheet.paste(strip, (x, y + label_height))
    return _write_picture(sheet, path)


def _strip(video: np.ndarray, frames: int, scale: int, gap: int, background: tuple[int, int, int]) -> Image.Image:
    count = min(frames, len(video))
    chosen = np.linspace(0, len(video) - 1, count).round().astype(int)
    height, width = video.shape[1] * scale, video.shape[2] * scale
    strip = Image.new("RGB", (count * (width + gap) - gap, height), background)
    for column, index in enumerate(chosen):
        image = Image.fromarray(video[index]).resize((width, height), Image.Resampling.NEAREST)
        strip.paste(image, (column * (width + gap), 0))
    return strip
