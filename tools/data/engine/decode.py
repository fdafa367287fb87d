"""Reading raw footage with PyAV: upright frames with their times, and one decoding shared by all pixel stages."""

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from opensora.utils.errors import UserError
from opensora.utils.video import is_video, read_image
from tools.data.engine.stage import Analyser, ClipInfo, Picture, PixelStage, Row

LUMA_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray")
# A file whose tail is damaged is still good for what comes before.
DECODE_ERRORS = (av.FFmpegError, ValueError)


def open_video(path: str | Path, threads: int = 1) -> Any:
    """Open the first video stream of a file for decoding.

    Args:
        path: a file.
        threads: decoder threads; 1 is right where a pool has a process per core.

    Returns:
        The PyAV container.

    Raises:
        UserError: no such file, an empty one, or nothing in it that can be decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise UserError(f"empty file (0 bytes): {path.name}")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"not a readable video: {path.name} ({reason(error)})") from error
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        container.close()
        raise UserError(f"no video stream in {path.name}, only {kinds}")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO" if threads != 1 else "NONE"
    stream.codec_context.thread_count = threads
    return container


def reason(error: Exception) -> str:
    """What FFmpeg says, without its number and the file's path."""
    return str(getattr(error, "strerror", None) or error)


def decode(container: Any, name: str = "") -> Iterator[tuple[float, Any]]:
    """Frames with their times in seconds; the first one is at 0. A damaged tail ends the clip early.

    Raises:
        UserError: not one frame can be decoded.
    """
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.base_rate or 25)
    first: float | None = None
    previous = -1.0
    frames = container.decode(stream)
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


def turns(frame: Any) -> int:
    """Quarter turns counter-clockwise that bring a frame upright (phones store them lying)."""
    return round(float(frame.rotation or 0) / 90) % 4


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


def picture(frame: Any) -> Picture:
    """An upright frame for the pixel stages."""
    quarter = turns(frame)

    def upright(image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(image, quarter)) if quarter else image

    return Picture(upright(luma(frame)), lambda: upright(converted(frame, "rgb24")))


def frame_rate(stream: Any) -> float:
    """Average frames per second, 0 if the file does not say."""
    return float(stream.average_rate or stream.guessed_rate or stream.base_rate or Fraction(0))


def _image_picture(path: str | Path) -> Picture:
    import cv2

    rgb = read_image(path)
    return Picture(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), lambda: rgb)


def clip_frames(path: str | Path) -> Iterator[tuple[float, Picture]]:
    """Frames of a clip or of a picture, upright, with their times."""
    if not is_video(path):
        yield 0.0, _image_picture(path)
        return
    with open_video(path) as container:
        for time, frame in decode(container, Path(path).name):
            yield time, picture(frame)


def clip_info(path: str | Path) -> ClipInfo:
    """Size and rate of a clip as a pixel stage is told them. Clips from ``cut`` are upright and of constant rate."""
    if not is_video(path):
        height, width = read_image(path).shape[:2]
        return ClipInfo(height, width, 0.0, 1)
    with open_video(path) as container:
        stream = container.streams.video[0]
        rate = frame_rate(stream)
        count = stream.frames
        if not count and stream.duration and stream.time_base:
            count = round(float(stream.duration * stream.time_base) * rate)
        if not count:
            count = sum(1 for packet in container.demux(stream) if packet.size)
        return ClipInfo(stream.height, stream.width, rate, int(count))


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
