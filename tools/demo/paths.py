"""Where the object of a demo clip is, frame by frame, and whether it goes on as it went: straight on, or back from the
border at the same speed."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.demo.analyse import SOLID, largest_piece, separate
from tools.demo.world import MARGIN, SIZE

FloatArray = NDArray[np.float64]
TURNS = 8  # times per frame at which something may turn back
ROUNDED = 2.0  # frames before and after a turn, which autoencoders round off: those of drawn clips, too
AT_BORDER = 2.5  # px, beyond the margin, that may be left between the border and what turns back there


class Track(NamedTuple):
    """An object through a clip of T frames.

    Attributes:
        centers: [T, 2] of its box, (x, y) in px.
        halves: [T, 2] of its box, half of width and height in px.
    """

    centers: FloatArray
    halves: FloatArray

    def part(self, begin: int, end: int) -> "Track":
        """The frames from ``begin`` up to ``end``."""
        return Track(self.centers[begin:end], self.halves[begin:end])


def track(frames: NDArray[np.uint8]) -> Track | None:
    """The object of a clip [T, H, W, 3]; None where a frame has none.

    The sides of its box lie where its coverage along them passes a half, between pixels.
    """
    boxes = []
    for frame in frames:
        color, cover = separate(frame)
        if color is None:
            return None
        body = np.where(largest_piece(cover > 0), cover, 0.0)
        if not (body > SOLID).any():
            return None
        boxes.append([*_ends(body.max(0)), *_ends(body.max(1))])
    left, right, top, bottom = np.array(boxes).T
    return Track(np.stack([left + right, top + bottom], 1) / 2, np.stack([right - left, bottom - top], 1) / 2)


def _ends(profile: FloatArray) -> tuple[float, float]:
    """Where a profile [N] of coverage begins and ends, px."""
    inside = np.flatnonzero(profile > SOLID)
    first, last = int(inside[0]), int(inside[-1])
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first + 1 - profile[first] - before, last + profile[last] + after


@dataclass(frozen=True)
class Course:
    """How an object goes through the middle of a clip.

    Attributes:
        stray: px that it is off a straight and even line, or one with a reversal at the border, at most; what is close
            to the turn does not count.
        speed_step: px that its speed in the second half of the frames takes it further than that in the first, or less
            far, over as much of the way as both halves show.
        turns: whether it turns back.
    """

    stray: float
    speed_step: float
    turns: bool


def course(found: Track, still: bool = False) -> Course:
    """The course that fits a piece of a track best.

    Args:
        found: odd number of frames, at least 5.
        still: whether it should not move at all; its course is its mean place then.
    """
    times = np.arange(len(found.centers), dtype=np.float64)
    if still:
        stray = np.linalg.norm(found.centers - found.centers.mean(0), axis=1).max()
        halves = [part.mean(0) for part in np.array_split(found.centers, 2)]
        return Course(float(stray), float(np.linalg.norm(halves[1] - halves[0])), False)
    best = _fit(found.centers, times, False)
    for turn in np.arange(1, TURNS * (len(times) - 1)) / TURNS:
        if _turns_at_border(found, turn):
            other = _fit(found.centers, np.abs(times - turn), True)
            best = min(best, other, key=lambda each: each.stray)
    return best


def _fit(centers: FloatArray, way: FloatArray, turns: bool) -> Course:
    """The course on which places follow from the way [T] that has been gone, or, with a turn, is still to go to it."""
    counts = way >= ROUNDED if turns else np.ones(len(way), bool)
    slope, start = np.polyfit(way[counts], centers[counts], 1)  # px per frame, px
    stray = np.linalg.norm(centers[counts] - (start + way[counts, None] * slope), axis=1).max()
    half, frames = len(way) // 2, np.arange(len(way))
    halves = [part[counts[part]] for part in (frames[: half + 1], frames[half:])]
    seen = min(float(np.ptp(way[part])) if len(part) else 0.0 for part in halves)  # frames
    if seen == 0:
        return Course(float(stray), 0.0, turns)
    before, after = (np.polyfit(way[part], centers[part], 1)[0] for part in halves)
    return Course(float(stray), float(np.linalg.norm(after - before)) * seen, turns)


def _turns_at_border(found: Track, turn: float) -> bool:
    """Whether an object that turns back at a time, in frames, is beside a border that it moves from or to."""
    axis = int(np.ptp(found.centers, axis=0).argmax())
    center, half = found.centers[round(turn), axis], found.halves[round(turn), axis]
    return bool(min(center - half, SIZE - center - half) <= MARGIN + AT_BORDER)
