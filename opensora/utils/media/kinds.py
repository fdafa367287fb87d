"""What a file is, by its content, and opening it."""

import functools
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import av
import av.format
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageSequence

from opensora.utils.errors import UserError
from opensora.utils.paths import is_file

Kind = Literal["picture", "clip"]

PICTURE = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|BM|II[*+]\0|MM\0[*+]|\0\0\0\x0cjP  |\xff\x4f\xff\x51|P[1-7]\s|RIFF....WEBP"
    rb"|....ftyp(?:avif|avis)",
    re.DOTALL,
)
MAYBE_ANIMATED = re.compile(rb"\x89PNG|GIF8|RIFF....WEBP|....ftyp(?:avif|avis)", re.DOTALL)
BY_PILLOW = re.compile(rb"RIFF....WEBP|....ftyp(?:avif|avis)", re.DOTALL)  # animations that FFmpeg does not decode
HEIF = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
CLIP_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mpg", ".3gp", ".mts", ".wmv", ".flv", ".gif")
HEAD_BYTES = 16
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000")

# Demuxers that take a text (or a picture in a PDF: mjpeg) for a film, or lead to other files and to the network.
NO_CLIP = {
    "mjpeg",
    "ico",
    "fits",
    "tty",
    "image2",
    "image2pipe",
    "hls",
    "dash",
    "concat",
    "sdp",
    "rtp",
    "rtsp",
    "sap",
    "imf",
    "lavfi",
}
UNREADABLE = "not a readable video: {path} ({reason})"
MAX_PIXELS = 2**26  # of a frame; 8192x8192
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError, EOFError)  # what PyAV raises for damaged files


def kind_of(path: str | Path) -> Kind | None:
    """Whether a file is a picture or a clip, by its content; None for anything else, and for a file that is not there.

    An animated GIF, PNG, WebP or AVIF is a clip. A damaged picture still is one.
    """
    head = _head(path)
    if PICTURE.match(head):
        return "clip" if MAYBE_ANIMATED.match(head) and _is_animated(path) else "picture"
    try:
        with open_clip(path):
            return "clip"
    except UserError:
        return None


def is_picture(path: str | Path) -> bool:
    """Whether a file is a picture that does not move, without looking for a film in it: a few bytes are read."""
    head = _head(path)
    return bool(PICTURE.match(head)) and not (MAYBE_ANIMATED.match(head) and _is_animated(path))


def _head(path: str | Path) -> bytes:
    if not is_file(path):  # a pipe may have no end, and no beginning either
        return b""
    try:
        with Path(path).open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):  # nothing of that name, and names that no system takes
        return b""


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture's header by Pillow; its errors, of whatever type, come as UserErrors that name the file."""
    if HEIF.match(_head(path)):
        raise UserError(f"not a readable image: {path} (HEIC; save it as JPEG or PNG)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, and of damaged metadata that is not used
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                yield image
    except UserError:
        raise
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise UserError(f"not a readable image: {path} ({error})") from error


def _is_animated(path: str | Path) -> bool:
    try:
        with open_picture(path) as image:
            return bool(getattr(image, "is_animated", False))
    except UserError:
        return False


@functools.cache
def _demuxers() -> str:
    """All formats that are clips, as FFmpeg's ``format_whitelist``."""
    names = (name for name in av.format.formats_available if not NO_CLIP & set(name.split(",")))
    return ",".join(sorted(name for name in names if not name.endswith("_pipe")))


def open_clip(path: str | Path, message: str = UNREADABLE) -> "av.container.InputContainer":
    """Open a clip for decoding, in whatever container; :func:`video_stream` is what to decode.

    Raises:
        UserError: missing, empty, no clip, a codec that is not known, or frames above :data:`MAX_PIXELS`.
    """
    head = _head(path)
    with decoding(path, message):
        if not is_file(path):
            raise FileNotFoundError("no such file")
        if HEIF.match(head) or (PICTURE.match(head) and not _is_animated(path)):
            raise ValueError("a picture")
        source = _transcoded(Path(path)) if BY_PILLOW.match(head) else _source(Path(path))
        limits = {"format_whitelist": _demuxers(), "protocol_whitelist": "file"}
        container = av.open(source, "r", container_options=limits, metadata_errors="replace")
    problem = _problem(container)
    if problem:
        container.close()
        raise UserError(f"{problem} in {path}")
    return container


def _source(path: Path) -> Any:
    """What FFmpeg opens: the file by its name, or without one where the name would make it a series of pictures."""
    if path.suffix.lower() in CLIP_ENDINGS and "%" not in path.name:
        return f"file:{path}"
    file = path.open("rb")
    return SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell, close=file.close)


def _problem(container: "av.container.InputContainer") -> str:
    """Why nothing can be decoded, empty if it may be."""
    if not any(not _is_cover(stream) for stream in container.streams.video):
        return "no video stream"
    context = video_stream(container).codec_context
    if context is None:
        return "an unknown video codec"
    if context.width * context.height > MAX_PIXELS:
        return f"frames of {context.width}x{context.height} pixels, which is too large,"
    return ""


def video_stream(container: "av.container.InputContainer") -> "av.VideoStream":
    """The video of an open clip; of several, the one that FFmpeg and players take: the main one, by its flags, its
    frames and its bit rate."""
    best = container.streams.best("video")
    if isinstance(best, av.VideoStream) and not _is_cover(best):
        return best
    return next(stream for stream in container.streams.video if not _is_cover(stream))


def _is_cover(stream: "av.VideoStream") -> bool:
    """Whether the "video" of a piece of music is the picture on its cover."""
    return bool(stream.disposition & Disposition.attached_pic)


@contextmanager
def decoding(path: str | Path, message: str = UNREADABLE) -> Iterator[None]:
    """Errors of decoding within come as UserErrors that name the file."""
    try:
        yield
    except UserError:
        raise
    except (*DECODE_ERRORS, MemoryError) as error:
        raise UserError(message.format(path=path, reason=reason(error))) from error


def reason(error: Exception) -> str:
    """What FFmpeg says, without its number and the file's path."""
    return str(getattr(error, "strerror", None) or error)


def _transcoded(path: Path) -> io.BytesIO:
    """An animation as a lossless film in memory, its frames shown as long as they were; transparency on white."""
    target = io.BytesIO()
    with open_picture(path) as image, av.open(target, "w", format="matroska") as container:
        stream = cast(av.VideoStream, container.add_stream("ffv1", rate=1000))
        stream.width, stream.height, stream.pix_fmt = *image.size, "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for picture in ImageSequence.Iterator(image):
            rgba = picture.convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            frame = av.VideoFrame.from_ndarray(np.asarray(rgb), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            duration = round(picture.info.get("duration") or 100)  # players show what has no duration for a tenth
            for packet in stream.encode(frame):  # this codec keeps none back
                packet.duration = duration
                container.mux(packet)
            time += duration
    target.seek(0)
    return target
