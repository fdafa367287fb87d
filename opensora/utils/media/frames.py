"""Decoding of clips: only the frames that are asked for, or all of them from either end."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from opensora.utils.errors import UserError
from opensora.utils.media.decoded import decoded
from opensora.utils.media.fields import header_says_fields, only_header_says_fields, progressive
from opensora.utils.media.kinds import DECODE_ERRORS, decoding, open_clip, video_stream
from opensora.utils.media.pixels import FrameConverter, OnHdr
from opensora.utils.media.timing import Timeline, mean_rate, same_rate, scan
from opensora.utils.paths import is_file

MAX_BYTES = 2**33  # of the frames that are held at a time
UNDECODABLE = "{path}: cannot be decoded ({reason})"
TIMED_FORMATS = {"mov", "mp4", "matroska", "webm"}  # containers that store when each frame is shown
TABLE_FORMATS = {"mov", "mp4"}  # whose header has it of all frames
JUMPING_FORMATS = {"mpegts", "mpeg"}  # recordings of streams, whose clocks jump
LENGTH_SLACK = 1.5  # frames by which a header's length may be off


def check_bytes(count: int, frame: NDArray[np.uint8]) -> None:
    """Raise a MemoryError if so many frames like this one are more than :data:`MAX_BYTES`."""
    if count * frame.nbytes > MAX_BYTES:
        height, width = frame.shape[:2]
        raise MemoryError(f"{count} frames of {height}x{width} pixels take more than {MAX_BYTES / 2**30:.0f} GiB")


def is_timed(container: "av.container.InputContainer") -> bool:
    """Whether frames can be found by the time at which they are shown."""
    return bool(TIMED_FORMATS & set(container.format.name.split(",")))


def converter_for(stream: "av.VideoStream", on_hdr: OnHdr = "map") -> FrameConverter:
    """A converter for the frames of a stream, whose pixels may not be square."""
    ratio = float(stream.sample_aspect_ratio or 1)
    return FrameConverter(None if ratio in (0.0, 1.0) else ratio, on_hdr)


def read_frames(
    path: str | Path, indices: Sequence[int], fps: float | None = None, on_hdr: OnHdr = "map"
) -> NDArray[np.uint8]:
    """Decode chosen frames of a clip.

    Seeks to the key frame before the first wanted frame, leaves out what no wanted frame refers to, and stops after
    the last wanted frame. Frames are numbered by the time at which they are shown: a clip of variable rate is read as
    if it had as many frames at its mean rate (see :meth:`Timeline.shown`). What this cannot find in a file with odd
    time stamps is looked for by decoding and counting from the start. Interlaced frames are deinterlaced.

    Args:
        path: clip in any container and codec FFmpeg knows.
        indices: frame numbers from 0, non-decreasing.
        fps: frames per second if known, for containers that do not say.
        on_hdr: what happens to clips of high dynamic range.

    Returns:
        uint8 ``[len(indices), H, W, 3]``: upright RGB of BT.709.

    Raises:
        UserError: unreadable file, a damaged frame, or fewer frames than asked for.
    """
    wanted = sorted(set(indices))
    with decoding(path, UNDECODABLE):
        found = _Search(path, wanted, fps, on_hdr).run()
    if found.missing:
        first = wanted[min(found.missing)]
        raise UserError(f"{path}: frame {first} of the {len(wanted)} wanted ones is not there or is damaged")
    if list(indices) == wanted:
        return found.pixels
    return found.pixels[[bisect_left(wanted, i) for i in indices]]


class _Collected:
    """Wanted frames as they are found: converted by one converter, straight into the array to be returned."""

    def __init__(self, count: int, convert: FrameConverter) -> None:
        self.missing = set(range(count))
        self._count, self._convert = count, convert
        self._pixels: NDArray[np.uint8] | None = None

    def take(self, positions: Sequence[int], frame: "av.VideoFrame") -> None:
        """Keep a frame at some positions among the wanted ones, unless it is damaged."""
        if frame.is_corrupt or not positions:
            return
        rgb = self._convert(frame)
        if self._pixels is None:
            check_bytes(self._count, rgb)
            self._pixels = np.empty((self._count, *rgb.shape), dtype=np.uint8)
        for position in positions:
            self._pixels[position] = rgb
        self.missing.difference_update(positions)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 ``[count, H, W, 3]``, once nothing is missing."""
        assert self._pixels is not None
        assert not self.missing
        return self._pixels


class _Search:
    """Looking for frames of one clip, first where they should be, then everywhere."""

    def __init__(self, path: str | Path, wanted: Sequence[int], fps: float | None, on_hdr: OnHdr) -> None:
        self.path, self.wanted, self.fps, self.on_hdr = path, wanted, fps, on_hdr
        self.by_header = False

    def run(self) -> _Collected:
        """The wanted frames; what is not there is missing."""
        found, interlaced = self._around(deinterlace=False)
        if interlaced:
            self.by_header = only_header_says_fields(self.path)
            found, _ = self._around(deinterlace=True)
        return self._counting() if found.missing else found

    def _timeline(self, constant: bool) -> Timeline | None:
        """Times of all frames; None where their order tells as much."""
        if constant:
            return None
        with open_clip(self.path, UNDECODABLE) as other:
            return scan(other)

    def _stamps(self, stream: "av.VideoStream", timeline: Timeline | None) -> tuple[list[int], int]:
        """Time stamp of each wanted frame and the largest distance at which one still is that frame."""
        if timeline is not None:
            shown = timeline.shown(self.wanted)
            return [timeline.stamps[i] for i in shown if i < len(timeline.stamps)], 0
        rate = float(stream.average_rate or self.fps or 0)
        if not stream.time_base or rate <= 0:
            return [], 0
        per_frame = 1 / (rate * float(stream.time_base))
        start = stream.start_time or 0
        return [start + round(i * per_frame) for i in self.wanted], int(per_frame / 4)

    def _around(self, deinterlace: bool) -> tuple[_Collected, bool]:
        """Decode the wanted frames and what they refer to; whether that was in vain since they are interlaced."""
        with open_clip(self.path, UNDECODABLE) as container:
            stream = video_stream(container)
            stream.thread_type = "NONE"  # loader workers are the parallelism; codec threads would fight them
            found = _Collected(len(self.wanted), converter_for(stream, self.on_hdr))
            if not is_timed(container):
                return found, False
            stamps, tolerance = self._stamps(stream, self._timeline(_is_constant(stream, self.fps)))
            if not stamps:
                return found, False
            if self.wanted[0] > 0:
                target = stamps[0]
                if deinterlace and stream.average_rate and stream.time_base:  # the frame before is needed, too
                    target -= round(1.5 / float(stream.average_rate * stream.time_base))
                container.seek(max(target, stream.start_time or 0), stream=stream, backward=True)
            lookup = _Nearest(stamps, tolerance)
            says_fields = header_says_fields(stream)
            frames = (
                progressive(container, stream, self.by_header) if deinterlace else _needed(container, stream, lookup)
            )
            for frame in frames:
                positions = lookup(frame.pts)
                if positions and not deinterlace and (frame.interlaced_frame or says_fields):
                    return found, True
                found.take(positions, frame)
                if not found.missing:
                    break
            return found, False

    def _counting(self) -> _Collected:
        """Decode everything from the start to the last wanted frame."""
        with open_clip(self.path, UNDECODABLE) as container:
            stream = video_stream(container)
            stream.thread_type = "NONE"
            timeline = self._timeline(is_constant(container))
            numbers = timeline.shown(self.wanted) if timeline else list(self.wanted)
            found = _Collected(len(self.wanted), converter_for(stream, self.on_hdr))
            lookup = _Nearest(numbers, 0)
            for count, frame in enumerate(progressive(container, stream)):
                found.take(lookup(count), frame)
                if count >= numbers[-1]:
                    break
        return found


def _is_constant(stream: "av.VideoStream", fps: float | None = None) -> bool:
    """Whether the header says one rate throughout, which is that of the table where it names one."""
    known = fps is None or not fps > 0 or same_rate(stream.average_rate, fps)
    return same_rate(stream.average_rate, stream.base_rate) and known and _is_filled(stream)


def _is_filled(stream: "av.VideoStream") -> bool:
    """Whether a header's frames take the time that it names, where it names both: an edit list that cuts some out, or
    puts a pause between them, changes the time alone."""
    if not (stream.frames and stream.duration and stream.time_base and stream.average_rate):
        return True
    return abs(float(stream.duration * stream.time_base * stream.average_rate) - stream.frames) <= LENGTH_SLACK


def is_constant(container: "av.container.InputContainer") -> bool:
    """Whether the order of the frames is all that there is to know: the header tells when each of them is shown, and
    that this is for the same time; or times may jump."""
    has_table = bool(TABLE_FORMATS & set(container.format.name.split(",")))
    return is_ordered(container) or (has_table and _is_constant(video_stream(container)))


def is_ordered(container: "av.container.InputContainer") -> bool:
    """Whether the times of frames may jump, so that their order is all that can be believed."""
    return bool(JUMPING_FORMATS & set(container.format.name.split(",")))


def _needed(
    container: "av.container.InputContainer", stream: "av.VideoStream", lookup: "_Nearest"
) -> Iterator["av.VideoFrame"]:
    """Decoded frames but those that are neither wanted nor referred to (half of them, with B-frames)."""

    def leave_out(context: Any, packet: "av.Packet") -> None:
        context.skip_frame = "DEFAULT" if packet.pts is None or lookup(packet.pts) else "NONREF"

    return decoded(container, stream, leave_out)


class _Nearest:
    """Positions in a sorted list of time stamps, with repetitions, of those within ``tolerance`` of a given one."""

    def __init__(self, stamps: Sequence[int], tolerance: int) -> None:
        self.stamps, self.tolerance = stamps, tolerance

    def __call__(self, stamp: int | None) -> range:
        if stamp is None:
            return range(0)
        first = bisect_left(self.stamps, stamp - self.tolerance)
        return range(first, bisect_left(self.stamps, stamp + self.tolerance + 1, first))


def read_clip(
    path: str | Path, max_frames: int | None = None, from_end: bool = False, on_hdr: OnHdr = "map"
) -> tuple[NDArray[np.uint8], float]:
    """Decode a clip from its beginning or end.

    Args:
        path: clip in any container and codec FFmpeg knows.
        max_frames: keep so many frames; None keeps all.
        from_end: keep the last ones instead of the first ones. No more than ``max_frames`` are in memory at a time.
        on_hdr: what happens to clips of high dynamic range.

    Returns:
        uint8 ``[T, H, W, 3]``, upright RGB of BT.709, and the frames per second (0.0 if the file does not say).
        Variable rates and interlaced frames are treated as in :func:`read_frames`.

    Raises:
        UserError: missing file, no video stream, or not one frame could be decoded.
    """
    if not is_file(path):
        raise UserError(f"video not found: {path}")
    with decoding(path):
        times, rate = _times(path)
        if times is None or times.is_constant:
            return _read_in_order(path, max_frames, from_end, on_hdr), rate
        count = len(times.stamps)
        kept = count if max_frames is None else min(max_frames, count)
        first = count - kept if from_end else 0
        return read_frames(path, range(first, first + kept), rate, on_hdr), rate


def _times(path: str | Path) -> tuple[Timeline | None, float]:
    """When the frames of a clip are shown, where the header does not tell, and their mean rate."""
    with open_clip(path) as container:
        times = None if is_constant(container) else scan(container)
        return times, mean_rate(video_stream(container), times)


def _read_in_order(path: str | Path, max_frames: int | None, from_end: bool, on_hdr: OnHdr) -> NDArray[np.uint8]:
    frames: deque[np.ndarray] = deque(maxlen=max_frames if from_end else None)
    with open_clip(path) as container:
        stream = video_stream(container)
        stream.thread_type = "AUTO"
        convert = converter_for(stream, on_hdr)
        try:
            for frame in progressive(container, stream):
                if max_frames is not None and not from_end and len(frames) >= max_frames:
                    break
                frames.append(convert(frame))
                check_bytes(len(frames), frames[-1])
        except DECODE_ERRORS:
            # A damaged tail still leaves the frames before it.
            if not frames:
                raise
    if not frames:
        raise UserError(f"no frames in {path}")
    return np.stack(frames)
