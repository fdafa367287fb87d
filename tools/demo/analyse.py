"""Tell from the pixels of a clip of the demo world what it shows: background, colour, shape, motion, and whether it is
one whole object.

No network is involved. The object is whatever differs from the colour along the border. The judge is as strict as an
eye that knows the world: a shape counts if it covers the ideal one of the best place and size nearly wholly, in all but
a few frames; so does being one piece without holes and of one colour; its centre must go straight and evenly.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tools.demo.world import BOUNCES, COLORS, SHAPES

MIN_CONTRAST = 45.0  # distance in RGB below which nothing stands out from the background
# Intersection over union that a shape must reach, pixel by pixel, chosen on labelled clips (tests/golden/judge): an eye
# forgives a triangle's worn tips, and sees the corners of a circle that has any.
MIN_OVERLAP = {"circle": 0.9425, "square": 0.9125, "triangle": 0.895}
SEEN_BEND = 1.0  # px: depth from which a dent or a bulge of the outline is seen
MAX_BENT = {"circle": 0.002, "square": 0.014, "triangle": 0.01}  # share of a shape that such dents and bulges may cover
MAX_BAD = 3 / 17  # share of frames that may be wrong
STILL_BELOW = 7.0  # px: half of the shortest travel in the training clips
TURNS = 65  # times of a clip at which something that bounces may turn back
MAX_DRIFT = 0.25  # largest movement across the direction, as a share of the movement along it
MAX_STRAY = 2.5  # px that the centre may be off a straight and even path, in all but a few frames
SOLID = 0.5  # coverage from which a pixel belongs to the shape
FULL = 0.95  # coverage on the border from which an object goes on beyond it; one beside it is blurred over it
FAINT = 0.35  # difference to the background, as a share of the object's, that is seen as another piece
MIN_PIECE = 8  # px: anything smaller is noise of compression and sampling
MAX_HOLE = 0.02  # share of the object that may be missing inside it
ROOM = 2  # px around an object in which its outline is looked for
MAX_SPOT = 0.15  # share of the object's inside that may have another colour
BETWEEN = 0.42  # of the way to another colour, from which a pixel is no longer its own: an eye hesitates before half
NOTHING, WHOLE = "none", "whole"

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Analysis:
    """What a clip shows, in the words of the demo world or "none".

    ``motion`` may also be "diagonal" or "uneven"; to and fro ("left and right", "up and down") is said of clips that
    show the turn; ``color`` "mixed", ``object`` is "whole" or what is wrong with it:
    "absent", "pieces", "holes" or "cut" (by the border). ``travel`` is (x, y) in px from the first to the last frame,
    ``overlap`` the intersection over union with the best outline, mean over the frames.
    """

    background: str
    color: str
    shape: str
    motion: str
    travel: tuple[float, float]
    overlap: float
    object: str = WHOLE


def analyse(frames: NDArray[np.uint8]) -> Analysis:
    """Analyse a clip.

    Args:
        frames: [T, H, W, 3], uint8 RGB.
    """
    border = np.concatenate([frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3)])
    sides = np.concatenate([frames[:, :, :2].reshape(-1, 3), frames[:, :, -2:].reshape(-1, 3)])
    background = "light" if np.median(np.concatenate([border, sides]).mean(1)) > 128 else "dark"
    found = [separate(frame) for frame in frames]
    if any(color is None for color, _ in found):
        return Analysis(background, NOTHING, NOTHING, NOTHING, (0.0, 0.0), 0.0, "absent")
    cover = np.stack([cover for _, cover in found])
    bodies = [largest_piece(frame_cover > SOLID) for frame_cover in cover]
    travel = measure_travel(np.stack(bodies).astype(np.float64))
    shape, overlap = name_shape(windows(bodies))
    motion = name_path(np.stack(bodies), travel)
    return Analysis(
        background, name_color(frames, bodies), shape, motion, travel, overlap, name_object(frames, bodies, cover)
    )


def mostly(right: Sequence[bool] | BoolArray) -> bool:
    """Whether all but a few frames are right."""
    return bool(np.mean(~np.asarray(right, bool)) <= MAX_BAD + 1e-9)


def largest_piece(mask: BoolArray) -> BoolArray:
    """The largest connected part of a mask [H, W]."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())[1:]
    return np.asarray(labels == 1 + int(sizes.argmax()))


def windows(bodies: Sequence[BoolArray]) -> FloatArray:
    """What an object looks like in each frame, wherever it is: ``[T, S, S]``, with a little room around it."""
    parts = []
    for body in bodies:
        rows, columns = (np.flatnonzero(body.any(axis)) for axis in (1, 0))
        parts.append(body[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    side = max(max(part.shape) for part in parts) + 2 * ROOM
    found = np.zeros((len(parts), side, side))
    for window, part in zip(found, parts, strict=True):
        window[ROOM : ROOM + part.shape[0], ROOM : ROOM + part.shape[1]] = part
    return found


def name_shape(bodies: FloatArray) -> tuple[str, float]:
    """The shape [T, H, W] that fits in nearly all frames, "none" if there is none, and how well the best one fits."""
    fits = {shape: fit_outline(bodies, shape) for shape in SHAPES}
    best = max(SHAPES, key=lambda name: float(fits[name][0].mean()))
    overlap, bent = fits[best]
    is_good = mostly((overlap >= MIN_OVERLAP[best]) & (bent <= MAX_BENT[best]))
    return best if is_good else NOTHING, float(overlap.mean())


def name_color(frames: NDArray[np.uint8], bodies: Sequence[BoolArray]) -> str:
    """The colour that the object has in nearly all frames and nearly everywhere, else "mixed"."""
    names, spotless = [], []
    for frame, body in zip(frames, bodies, strict=True):
        inside = ndimage.binary_erosion(body, iterations=2)
        pixels = frame[inside if inside.any() else body].astype(np.float64)
        name = nearest_color(np.median(pixels, axis=0))
        names.append(name)
        spotless.append(float(np.mean(towards_others(pixels, name) > BETWEEN)) <= MAX_SPOT)
    name, _ = Counter(names).most_common(1)[0]
    return name if mostly([found == name and clean for found, clean in zip(names, spotless)]) else "mixed"


def name_object(frames: NDArray[np.uint8], bodies: Sequence[BoolArray], cover: FloatArray) -> str:
    """Whether the object is one piece without holes, wholly inside the frame, in nearly all frames."""
    single, filled, inside = [], [], []
    for frame, body, covered in zip(frames, bodies, cover, strict=True):
        distance = np.linalg.norm(frame.astype(np.float64) - ground_of(frame), axis=-1)
        seen = distance > FAINT * float(np.median(distance[body]))
        labels, _ = ndimage.label(seen & ~ndimage.binary_dilation(body, iterations=2))
        single.append(int(np.bincount(labels.ravel())[1:].max(initial=0)) < MIN_PIECE)
        hole = int(ndimage.binary_fill_holes(body).sum() - body.sum())
        filled.append(hole <= MAX_HOLE * body.sum())
        solid = body & (covered > FULL)
        inside.append(not (solid[[0, -1]].any() or solid[:, [0, -1]].any()))
    if not mostly(single):
        return "pieces"
    if not mostly(filled):
        return "holes"
    return WHOLE if mostly(inside) else "cut"


def name_path(bodies: BoolArray, travel: tuple[float, float]) -> str:
    """Name of the motion of an object [T, H, W] that travels so far in all: see :class:`Analysis`."""
    centers = np.array([ndimage.center_of_mass(body) for body in bodies])[:, ::-1]  # x, y
    motion = name_motion(*travel)
    if motion == "diagonal" or (motion == "still" and np.ptp(centers, axis=0).max() < STILL_BELOW):
        return motion
    if motion != "still" and keeps_to(centers, np.linspace(0.0, 1.0, len(centers)))[0]:
        return motion
    return name_bounce(centers) or ("still" if motion == "still" else "uneven")


def keeps_to(centers: FloatArray, way: FloatArray) -> tuple[bool, FloatArray]:
    """Whether centres [T, 2] lie evenly on a straight line in nearly all frames, and the px per unit of the way.

    Args:
        centers: (x, y) in px.
        way: [T], what has been gone by each frame, in any unit.
    """
    kept = np.ones(len(centers), bool)
    for _ in range(2):  # the second time without the frames that stray most, which pull the path towards them
        fits = [np.polyfit(way[kept], axis[kept], 1) for axis in centers.T]
        path = np.stack([np.polyval(line, way) for line in fits], axis=1)
        stray = np.linalg.norm(centers - path, axis=1)
        kept = stray <= np.sort(stray)[::-1][round(MAX_BAD * len(stray))]
    return mostly(stray <= MAX_STRAY), np.array([line[0] for line in fits])


def name_bounce(centers: FloatArray) -> str | None:
    """Which way centres [T, 2] go to and fro, turning once on a straight line without a change of speed; None if they
    do not."""
    times = np.linspace(0.0, 1.0, len(centers))
    best = None
    for turn in np.linspace(0.0, 1.0, TURNS)[1:-1]:
        way = np.abs(times - turn)
        design = np.stack([way, np.ones_like(way)], axis=1)
        rest = float(np.linalg.norm(centers - design @ np.linalg.lstsq(design, centers, rcond=None)[0]))
        if best is None or rest < best[0]:
            best = rest, way
    assert best is not None
    is_even, speed = keeps_to(centers, best[1])
    along, across = np.abs(speed).max(), np.abs(speed).min()
    if not is_even or along < STILL_BELOW or across > MAX_DRIFT * along:
        return None
    return next(name for name, step in BOUNCES.items() if bool(step[0]) == (abs(speed[0]) > abs(speed[1])))


def ground_of(frame: NDArray[np.uint8]) -> FloatArray:
    """Colour [3] of the background of a frame [H, W, 3]: the median along its border."""
    pixels = frame.astype(np.float64)
    ring = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    return np.asarray(np.median(np.concatenate([ring, pixels[:, -2:].reshape(-1, 3)]), axis=0))


def separate(frame: NDArray[np.uint8]) -> tuple[FloatArray | None, FloatArray]:
    """Colour [3] of the object in a frame [H, W, 3] (None if there is none) and its coverage [H, W] in [0, 1]."""
    pixels, ground = frame.astype(np.float64), ground_of(frame)
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


def towards_others(pixels: FloatArray, name: str) -> FloatArray:
    """How far pixels [N, 3] have gone from a colour of this world to another one, the nearest: 0 to 1 [N]."""
    own = np.array(COLORS[name], np.float64)
    ways = np.array([value for other, value in COLORS.items() if other != name]) - own
    return np.asarray(((pixels - own) @ ways.T / (ways**2).sum(1)).max(1))


def fit_outline(bodies: FloatArray, shape: str) -> tuple[FloatArray, FloatArray]:
    """How well objects [T, H, W], 0 or 1, fit a shape of free position and size.

    Whole pixels are compared with whole pixels: by coverage, the outline alone would cost a small shape 5 %.

    Returns:
        Intersection over union [T], and the share [T] of the shape by which the outline is dented or bulges visibly.
    """
    depth = _depth(shape, bodies.shape, fit(bodies, shape))
    ideal, body = depth > 0, bodies > SOLID
    overlap = (ideal & body).sum((1, 2)) / np.maximum((ideal | body).sum((1, 2)), 1)
    bent = (ideal != body) & (np.abs(depth) > SEEN_BEND)
    return overlap, bent.sum((1, 2)) / np.maximum(ideal.sum((1, 2)), 1)


def fit(cover: FloatArray, shape: str) -> FloatArray:
    """Place [3, T] at which a shape covers a coverage [T, H, W] best: x, y and radius in each frame."""
    area = np.maximum(cover.sum((1, 2)), 1.0)
    y = (cover.sum(2) * (np.arange(cover.shape[1]) + 0.5)).sum(1) / area
    x = (cover.sum(1) * (np.arange(cover.shape[2]) + 0.5)).sum(1) / area
    filled = {"circle": np.pi, "square": 4.0, "triangle": 2.0}[shape]
    radius = np.sqrt(area / filled)
    if shape == "triangle":
        y = y - radius / 3  # from the centre of mass to the centre of its box
    place = np.stack([x, y, radius])
    best = _overlap(cover, _outline(shape, cover.shape, place))
    for step in (1.0, 0.5, 0.25, 0.5, 0.25, 0.25, 0.125):  # twice: the axes depend on each other
        for axis in (0, 1, 2):
            for move in (-step, step):
                trial = place.copy()
                trial[axis] += move
                overlap = _overlap(cover, _outline(shape, cover.shape, trial))
                better = overlap > best
                place[:, better] = trial[:, better]
                best = np.maximum(best, overlap)
    return place


def _circle(dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    return radius - np.sqrt(dx**2 + dy**2)


def _square(dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    return radius - np.maximum(np.abs(dx), np.abs(dy))


def _triangle(dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    return np.minimum(radius - dy, (dy + radius - 2 * np.abs(dx)) / np.sqrt(5.0))


# How far inside its outline, in px, a point lies that is (dx, dy) away from the centre of a shape.
_DEPTHS: dict[str, Callable[[FloatArray, FloatArray, FloatArray], FloatArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


def _depth(shape: str, size: tuple[int, ...], place: FloatArray) -> FloatArray:
    """How far inside a shape at ``place`` [3, T] each pixel lies, in px, [T, H, W]; below zero outside."""
    x, y, radius = (value[:, None, None] for value in place)
    rows = np.arange(size[1])[None, :, None] + 0.5
    columns = np.arange(size[2])[None, None, :] + 0.5
    return _DEPTHS[shape](columns - x, rows - y, radius)


def _outline(shape: str, size: tuple[int, ...], place: FloatArray) -> FloatArray:
    """Coverage [T, H, W] of a shape at ``place`` [3, T]: x, y and radius in each frame."""
    return np.clip(_depth(shape, size, place) + 0.5, 0.0, 1.0)


def _overlap(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.minimum(a, b).sum((1, 2)) / np.maximum(np.maximum(a, b).sum((1, 2)), 1e-6)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; 99 for equal ones."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, float(10 * np.log10(255**2 / error)))
