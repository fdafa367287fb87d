"""When the frames of a clip are shown, and which frame is shown when."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av

from opensora.utils.media.kinds import DECODE_ERRORS, video_stream

HEADER_TOLERANCE = 0.1  # the same where the other rate is that of a few rounded times
RATE_TOLERANCE = 1e-3  # relative difference of two rates above which they are not the same


@dataclass(frozen=True)
class Timeline:
    """Sorted times of all frames of a clip and the end of the last one, in the clip's time base."""

    stamps: tuple[int, ...]
    end: int

    @property
    def step(self) -> float:
        """Mean time between frames; 0 if nothing tells."""
        return (self.end - self.stamps[0]) / len(self.stamps) if self.stamps else 0.0

    def shown(self, indices: Iterable[int]) -> list[int]:
        """Frames that are on display in the middle of the given ones of as many frames of equal length.

        A clip of ``n`` frames is taken for ``n`` frames at its mean rate, whatever their lengths: where it stands
        still, a frame occurs again, and where it is fast, some are passed over. With a constant rate each is itself.
        Numbers beyond the end stay beyond it.
        """
        count, start, step = len(self.stamps), self.stamps[0], self.step
        return [i if i >= count else max(bisect_right(self.stamps, start + (i + 0.5) * step) - 1, 0) for i in indices]

    @property
    def is_constant(self) -> bool:
        """Whether all frames are shown when they would be at the mean rate, but for rounding."""
        return self.shown(range(len(self.stamps))) == list(range(len(self.stamps)))


def header_rate(stream: "av.VideoStream") -> float:
    """Frames per second by the header; 0 if nothing says.

    Of a clip of a frame or two FFmpeg has no mean. What it calls the base rate is then that of the fields, or that at
    which the container's clock ticks; the codec's own rate is looked at before it.
    """
    return float(stream.average_rate or stream.codec_context.framerate or stream.base_rate or 0)


def mean_rate(stream: "av.VideoStream", times: Timeline | None) -> float:
    """Frames per second by the header, or by the times of the frames where these contradict it; 0 if nothing says."""
    header = header_rate(stream)
    if times is None or times.step <= 0 or not stream.time_base:
        return header
    mean = 1 / (times.step * float(stream.time_base))
    return header if times.is_constant and abs(header / mean - 1) < HEADER_TOLERANCE else mean


def same_rate(first: Fraction | float | None, second: Fraction | float | None) -> bool:
    """Whether two frame rates are known and the same."""
    return bool(first and second and abs(float(first) / float(second) - 1) < RATE_TOLERANCE)


def scan(container: "av.container.InputContainer") -> Timeline | None:
    """Times of all frames from the packets of a clip, decoding none; up to the cut where the file was cut short.

    Returns:
        None where packets have no times.
    """
    spans: list[tuple[int, int]] = []
    try:
        for packet in container.demux(video_stream(container)):
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    return None
                spans.append((packet.pts, packet.duration or 0))
    except DECODE_ERRORS:
        pass
    return timeline(spans) if spans else None


def timeline(spans: Sequence[tuple[int, int]]) -> Timeline:
    """Of (time, length) of each frame, in any order; a last frame without a length has that of the others."""
    ordered = sorted(spans)
    stamps = tuple(stamp for stamp, _ in ordered)
    last = ordered[-1][1] or round((stamps[-1] - stamps[0]) / max(len(stamps) - 1, 1))
    return Timeline(stamps, stamps[-1] + last)
