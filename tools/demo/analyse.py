"""Tell from the pixels of a clip of the demo world what it shows: background, colour, shape and motion.

No network is involved. The object is whatever differs from the colour along the border; its shape is the one of three
outlines that covers it best; its motion is where its centre ends up.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.demo.world import COLORS, SHAPES

MIN_CONTRAST = 45.0  # distance in RGB below which nothing stands out from the background
MIN_OVERLAP = 0.5  # intersection over union that the best outline must reach to count as a shape
STILL_BELOW = 7.0  # px: half of the shortest travel in the training clips
MAX_DRIFT = 0.5  # largest movement across the direction, as a share of the movement along it
MIN_SEEN = 0.75  # share of frames that must show an object
NOTHING = "none"

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Analysis:
    """What a clip shows, in the words of the demo world or "none"; ``motion`` may also be "diagonal".

    ``travel`` is (x, y) in px from the first to the last frame, ``overlap`` the intersection over union with the best
    outline, mean over the frames that show an object.
    """

    background: str
    color: str
    shape: str
    motion: str
    travel: tuple[float, float]
    overlap: float


def analyse(frames: NDArray[np.uint8]) -> Analysis:
    """Analyse a clip.

    Args:
        frames: [T, H, W, 3], uint8 RGB.
    """
    border = np.concatenate([frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3)])
    sides = np.concatenate([frames[:, :, :2].reshape(-1, 3), frames[:, :, -2:].reshape(-1, 3)])
    background = "light" if np.median(np.concatenate([border, sides]).mean(1)) > 128 else "dark"
    found = [separate(frame) for frame in frames]
    colors = Counter(nearest_color(color) for color, _ in found if color is not None)
    seen = [color is not None for color, _ in found]
    if np.mean(seen) < MIN_SEEN:
        return Analysis(background, NOTHING, NOTHING, NOTHING, (0.0, 0.0), 0.0)
    cover = np.stack([cover for _, cover in found])[seen]
    travel = measure_travel(cover)
    overlaps = {shape: float(fit_outline(cover, shape).mean()) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    overlap = overlaps[shape]
    if overlap < MIN_OVERLAP:
        shape = NOTHING
    return Analysis(background, colors.most_common(1)[0][0], shape, name_motion(*travel), travel, overlap)


def separate(frame: NDArray[np.uint8]) -> tuple[FloatArray | None, FloatArray]:
    """Colour [3] of the object in a frame [H, W, 3] (None if there is none) and its coverage [H, W] in [0, 1]."""
    pixels = frame.astype(np.float64)
    ring = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ring = np.concatenate([ring, pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(ring, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    # The smallest object covers 5 % of a frame, so this quantile lies inside it.
    top = float(np.quantile(distance, 0.98))
    if top < MIN_CONTRAST:
        return None, np.zeros(frame.shape[:2])
    color = np.median(pixels[distance > 0.75 * top], axis=0)
    axis = color - ground
    cover = np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1e-6), 0.0, 1.0)
    return color, np.where(cover < 0.2, 0.0, cover)  # compression and sampling noise is no object


def nearest_color(color: FloatArray) -> str:
    """Name of the colour of this world that is nearest to an RGB value."""
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.array(COLORS[name]) - color)))


def measure_travel(cover: FloatArray) -> tuple[float, float]:
    """Movement (x, y) in px of the centre of mass of a coverage [T, H, W] from the first to the last frame.

    Taken from a straight line through all frames, so that one bad frame does not decide.
    """
    mass = np.where(cover > 0.5, cover, 0.0)
    total = np.maximum(mass.sum((1, 2)), 1e-6)
    y = (mass.sum(2) * np.arange(cover.shape[1])).sum(1) / total
    x = (mass.sum(1) * np.arange(cover.shape[2])).sum(1) / total
    if len(cover) < 2:
        return 0.0, 0.0
    times = np.linspace(0.0, 1.0, len(cover))
    return float(np.polyfit(times, x, 1)[0]), float(np.polyfit(times, y, 1)[0])


def name_motion(dx: float, dy: float) -> str:
    """Name of a movement in px (y points down): a direction, "still" or "diagonal"."""
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < STILL_BELOW:
        return "still"
    if across > MAX_DRIFT * along:
        return "diagonal"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def fit_outline(cover: FloatArray, shape: str) -> FloatArray:
    """Best intersection over union [T] of a coverage [T, H, W] with a shape of free position and size."""
    area = np.maximum(cover.sum((1, 2)), 1.0)
    y = (cover.sum(2) * (np.arange(cover.shape[1]) + 0.5)).sum(1) / area
    x = (cover.sum(1) * (np.arange(cover.shape[2]) + 0.5)).sum(1) / area
    filled = {"circle": np.pi, "square": 4.0, "triangle": 2.0}[shape]
    radius = np.sqrt(area / filled)
    if shape == "triangle":
        y = y - radius / 3  # from the centre of mass to the centre of its box
    place = np.stack([x, y, radius])
    best = _overlap(cover, _outline(shape, cover.shape, place))
    for step in (2.0, 1.0, 0.5):
        for axis in (0, 1, 2):
            for move in (-step, step):
                trial = place.copy()
                trial[axis] += move
                overlap = _overlap(cover, _outline(shape, cover.shape, trial))
                better = overlap > best
                place[:, better] = trial[:, better]
                best = np.maximum(best, overlap)
    return best


def _circle(dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    return radius - np.sqrt(dx**2 + dy**2)


def _square(dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    return radius - np.maximum(np.abs(dx), np.abs(dy))


def _triangle(dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    return np.minimum(radius - dy, (dy + radius - 2 * np.abs(dx)) / np.sqrt(5.0))


# How far inside its outline, in px, a point lies that is (dx, dy) away from the centre of a shape.
_DEPTH: dict[str, Callable[[FloatArray, FloatArray, FloatArray], FloatArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


def _outline(shape: str, size: tuple[int, ...], place: FloatArray) -> FloatArray:
    """Coverage [T, H, W] of a shape at ``place`` [3, T]: x, y and radius in each frame."""
    x, y, radius = (value[:, None, None] for value in place)
    rows = np.arange(size[1])[None, :, None] + 0.5
    columns = np.arange(size[2])[None, None, :] + 0.5
    return np.clip(_DEPTH[shape](columns - x, rows - y, radius) + 0.5, 0.0, 1.0)


def _overlap(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.minimum(a, b).sum((1, 2)) / np.maximum(np.maximum(a, b).sum((1, 2)), 1e-6)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; 99 for equal ones."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, float(10 * np.log10(255**2 / error)))
