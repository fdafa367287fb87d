"""Frames of footage with their times, by :mod:`opensora.utils.media`, and one decoding shared by all pixel stages."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from opensora.utils.errors import UserError
from opensora.utils.media.fields import progressive
from opensora.utils.media.frames import converter_for, is_ordered
from opensora.utils.media.hdr import needs_mapping
from opensora.utils.media.kinds import DECODE_ERRORS, is_picture, open_clip, reason, video_stream
from opensora.utils.media.orientation import Orientation, orientation_of
from opensora.utils.media.pictures import read_picture
from opensora.utils.media.pixels import has_alpha
from opensora.utils.media.probe import probe
from opensora.utils.media.timing import header_rate
from tools.data.engine.stage import Analyser, ClipInfo, Picture, PixelStage, Row

LUMA_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray")
# FFmpeg's (ISO/IEC 23091-2) numbers of colour matrices, by the names that its filters take; 2 is not known
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
UNKNOWN_MATRIX = 2


def open_video(path: str | Path, threads: int = 1) -> Any:
    """Open the first video stream of a file, in whatever container, for decoding.

    Args:
        path: a file.
        threads: decoder threads; 1 is right where a pool has a process per core.

    Returns:
        The PyAV container.

    Raises:
        UserError: no such file, an empty one, or nothing in it that can be decoded.
    """
    path = Path(path)
    check_file(path)
    try:
        container = open_clip(path)
    except UserError as error:  # whose message is shown beside the path
        raise UserError(str(error).replace(str(path), path.name)) from error
    stream = video_stream(container)
    stream.thread_type = "AUTO" if threads != 1 else "NONE"
    stream.codec_context.thread_count = threads
    return container


def check_file(path: Path) -> None:
    """Raise a UserError for a file that is not there, or empty."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise UserError(f"empty file (0 bytes): {path.name}")


def decode(container: Any, name: str = "") -> Iterator[tuple[float, Any]]:
    """Whole frames (interlaced ones are deinterlaced) with their times in seconds; the first one is at 0. A damaged
    tail ends the clip early. In recordings of streams, whose clocks jump, the order of frames tells their times.

    Raises:
        UserError: not one frame can be decoded.
    """
    stream = video_stream(container)
    rate = header_rate(stream) or 25.0
    first: float | None = None
    previous = -1.0
    ordered = is_ordered(container)
    frames = progressive(container, stream)
    while True:
        try:
            frame = next(frames, None)
        except DECODE_ERRORS as error:
            if first is None:
                raise UserError(f"not one frame of {name} can be decoded ({reason(error)})") from error
            return
        if frame is None:
            if first is None:
                raise UserError(f"no frames in {name}")
            return
        if ordered:
            frame.pts = None
        time = float(frame.pts * frame.time_base) if frame.pts is not None and frame.time_base else None
        if first is None:
            first = time or 0.0
        # raw streams have no times
        time = previous + 1 / rate if time is None and previous >= 0 else (time if time is not None else first)
        time = max(time - first if frame.pts is not None else time, 0.0)
        if previous >= 0 and time <= previous:
            continue  # a repeated or backward time stamp: such a frame is never shown
        previous = time
        yield time, frame


def luma(frame: Any) -> np.ndarray:
    """Brightness of a frame, uint8 [H, W], as stored (not upright): the raw Y plane where there is one."""
    if frame.format.name in LUMA_FORMATS:
        plane = frame.planes[0]
        whole = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        return whole[: frame.height, : frame.width]
    return converted(frame, "gray")


def converted(frame: Any, pixels: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """A frame in other pixels (``rgb24``, ...) and perhaps another (width, height), on one thread like all decoding."""
    width, height = size or (None, None)
    return frame.reformat(width=width, height=height, format=pixels, threads=1).to_ndarray()


@dataclass(frozen=True)
class Shown:
    """A frame as a filter graph takes it, and what is still to be done to it.

    Args:
        frame: as stored; or, where a graph cannot show it rightly (high dynamic range, other colours, transparency),
            as RGB that is upright and of square pixels.
        upright: how it is turned.
        aspect: width of a pixel by its height.
        matrix: of its colours, by FFmpeg's name; empty for RGB.
    """

    frame: Any
    upright: Orientation = field(default_factory=Orientation)
    aspect: float = 1.0
    matrix: str = ""


class Shower:
    """Says of the frames of one stream how they are to be shown."""

    def __init__(self, stream: Any) -> None:
        self.convert = converter_for(stream)
        self.aspect = float(stream.sample_aspect_ratio or 1) or 1.0

    def __call__(self, frame: Any) -> Shown:
        """One frame."""
        matrix = matrix_of(frame)
        if is_mapped(frame) or not matrix or has_alpha(frame):
            rgb = np.ascontiguousarray(self.convert(frame))
            return Shown(av.VideoFrame.from_ndarray(rgb, format="rgb24"))
        return Shown(frame, orientation_of(frame), self.aspect, matrix)

    def picture(self, frame: Any) -> Picture:
        """One frame for the pixel stages."""
        if is_mapped(frame) or has_alpha(frame) or self.aspect != 1.0:
            rgb = np.ascontiguousarray(self.convert(frame))
            return Picture(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), lambda: rgb)
        brightness = np.ascontiguousarray(orientation_of(frame).apply(luma(frame)))
        return Picture(brightness, lambda: np.ascontiguousarray(self.convert(frame)))


def is_mapped(frame: Any) -> bool:
    """Whether a frame's brightness is not that of the standard range, so that it has to be mapped to it."""
    return needs_mapping(int(frame.color_trc), int(frame.color_primaries))


def matrix_of(frame: Any) -> str:
    """FFmpeg's name of a frame's colour matrix, where it says none by its size as players do; empty for RGB and for
    matrices that filters do not know."""
    if frame.format.is_rgb:
        return ""
    if int(frame.colorspace) == UNKNOWN_MATRIX:
        return "bt709" if frame.width >= 1280 or frame.height > 576 else "bt601"
    return MATRICES.get(int(frame.colorspace), "")


def _image_picture(path: str | Path) -> Picture:
    rgb = read_picture(path)
    return Picture(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), lambda: rgb)


def clip_frames(path: str | Path) -> Iterator[tuple[float, Picture]]:
    """Frames of a clip or of a picture, upright, with their times."""
    if is_picture(path):
        yield 0.0, _image_picture(path)
        return
    with open_video(path) as container:
        shower = Shower(video_stream(container))
        for time, frame in decode(container, Path(path).name):
            yield time, shower.picture(frame)


def clip_info(path: str | Path) -> ClipInfo:
    """Size and rate of a clip as a pixel stage is told them; the rate of a picture is 0."""
    info = probe(path)
    return ClipInfo(info.height, info.width, 0.0 if info.kind == "picture" else info.fps, info.num_frames)


class PixelWorker:
    """Decodes a clip once for all stages that want it.

    Args:
        stages: the group; their ``settings`` and ``root``.
    """

    def __init__(self, stages: Sequence[PixelStage]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.root = stages[0].root

    def __call__(self, row: Row, names: Collection[str]) -> dict[str, Row | Exception]:
        """Result of each named stage, or the exception that it ended with. A stage's failure is not the others'."""
        results: dict[str, Row | Exception] = {}
        analysers: dict[str, Analyser] = {}
        path = self.root / row["clip_path"]
        try:
            info = clip_info(path)
            for name in (name for name in self.stages if name in names):
                try:
                    analysers[name] = self.stages[name].analyser(row, info)
                except Exception as error:
                    results[name] = error
            for index, (time, frame) in enumerate(clip_frames(path)):
                for name in list(analysers):
                    try:
                        analysers[name].add(index, time, frame)
                    except Exception as error:
                        results[name] = error
                        del analysers[name]
        except Exception as error:
            return dict.fromkeys(names, error)
        for name, analyser in analysers.items():
            try:
                results[name] = analyser.result()
            except Exception as error:
                results[name] = error
        return results
