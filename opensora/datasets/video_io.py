"""Decoding of only the frames that training asks for (PyAV)."""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

CONSTANT_RATE_TOLERANCE = 1e-3  # relative difference of average and base rate above which a rate counts as variable

TIMED_FORMATS = {"mov", "mp4", "matroska", "webm"}  # containers that store when each frame is shown


class BrokenMediaError(RuntimeError):
    """A clip or picture of the dataset cannot be used; the message names file and reason."""


def read_frames(path: str | Path, indices: Sequence[int], fps: float | None = None) -> NDArray[np.uint8]:
    """Decode chosen frames of a video.

    Seeks to the key frame before the first wanted frame, leaves out what no wanted frame refers to, and stops after
    the last wanted frame. Frames are numbered by their time stamps: from the rate where it is constant, by order
    otherwise. What this cannot find in a file with odd time stamps is looked for by decoding and counting from the
    start.

    Args:
        path: video file.
        indices: frame numbers from 0, non-decreasing.
        fps: frames per second if known, for containers that do not say.

    Returns:
        uint8 ``[len(indices), H, W, 3]``, RGB.

    Raises:
        BrokenMediaError: unreadable file, a damaged frame, or fewer frames than asked for.
    """
    wanted = sorted(set(indices))
    try:
        found = _decode_around(str(path), wanted, fps)
        if found.missing:
            found = _decode_counting(str(path), wanted)
    except (FFmpegError, OSError, IndexError, ValueError) as error:
        raise BrokenMediaError(f"{path}: cannot be decoded ({error})") from error
    if found.missing:
        first = wanted[min(found.missing)]
        raise BrokenMediaError(f"{path}: frame {first} of the {len(wanted)} wanted ones is not there or is damaged")
    if list(indices) == wanted:
        return found.pixels
    return found.pixels[[bisect_left(wanted, i) for i in indices]]


def _time_stamps(
    path: str, stream: "av.VideoStream", wanted: Sequence[int], fps: float | None
) -> tuple[list[int], int] | None:
    """Time stamps of the wanted frames and the largest distance at which one still is that frame.

    None where nothing tells: no time base, or packets without time stamps.
    """
    average, base = stream.average_rate, stream.base_rate
    rate = float(average or fps or 0)
    if not stream.time_base or rate <= 0:
        return None
    constant = average is not None and base is not None and abs(average / base - 1) < CONSTANT_RATE_TOLERANCE
    per_frame = 1 / (rate * float(stream.time_base))
    if constant:
        start = stream.start_time or 0
        return [start + round(i * per_frame) for i in wanted], int(per_frame / 4)
    stamps: list[int] = []
    with av.open(path) as other:  # variable rate: the order of all packets tells, without decoding any
        for packet in other.demux(other.streams.video[0]):
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    return None
                stamps.append(packet.pts)
    stamps.sort()
    return [stamps[i] for i in wanted if i < len(stamps)], 0


class _Collected:
    """Wanted frames as they are found: converted by one converter, straight into the array to be returned."""

    def __init__(self, count: int) -> None:
        self.missing = set(range(count))
        self._count = count
        self._pixels: NDArray[np.uint8] | None = None
        self._converter = VideoReformatter()

    def take(self, position: int, frame: "av.VideoFrame") -> None:
        """Keep a frame as number ``position`` of the wanted ones, unless it is damaged."""
        if frame.is_corrupt:
            return
        rgb = self._converter.reformat(frame, format="rgb24").to_ndarray()
        if self._pixels is None:
            self._pixels = np.empty((self._count, *rgb.shape), dtype=np.uint8)
        self._pixels[position] = rgb
        self.missing.discard(position)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 ``[count, H, W, 3]``, once nothing is missing."""
        assert self._pixels is not None
        assert not self.missing
        return self._pixels


def _decode_around(path: str, wanted: Sequence[int], fps: float | None) -> _Collected:
    """Wanted frames, decoding only them and what they refer to; what is not found is left out."""
    found = _Collected(len(wanted))
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # loader workers are the parallelism; codec threads would fight them
        timed = TIMED_FORMATS & set(container.format.name.split(","))
        known = _time_stamps(path, stream, wanted, fps) if timed else None
        if known is None or not known[0]:
            return found
        stamps, tolerance = known
        if wanted[0] > 0:
            container.seek(stamps[0], stream=stream, backward=True)
        context = stream.codec_context
        lookup = _Nearest(stamps, tolerance)
        for packet in container.demux(stream):
            # Frames that are neither wanted nor referred to (half of them, with B-frames) need not be decoded.
            is_wanted = packet.pts is None or lookup(packet.pts) is not None
            context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            for frame in packet.decode():
                position = lookup(frame.pts) if frame.pts is not None else None
                if position is not None:
                    found.take(position, frame)
            if not found.missing:
                break
    return found


class _Nearest:
    """Position in a sorted list of time stamps of the one within ``tolerance`` of a given one."""

    def __init__(self, stamps: Sequence[int], tolerance: int) -> None:
        self.stamps, self.tolerance = stamps, tolerance

    def __call__(self, stamp: int) -> int | None:
        at = bisect_left(self.stamps, stamp - self.tolerance)
        return at if at < len(self.stamps) and self.stamps[at] <= stamp + self.tolerance else None


def _decode_counting(path: str, wanted: Sequence[int]) -> _Collected:
    """Wanted frames, decoding everything from the start to the last one."""
    positions = {number: position for position, number in enumerate(wanted)}
    found = _Collected(len(wanted))
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for count, frame in enumerate(container.decode(stream)):
            if count in positions:
                found.take(positions[count], frame)
            if count >= wanted[-1]:
                break
    return found
