"""The small world that the demo model learns: one coloured shape that moves, or not, on a dark or a light background.

Everything that defines the world is here: its words, the combinations kept out of training, how a scene is drawn and
how it is described. A frame is 64x64 pixels, a clip 17 frames at 8 frames per second.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64  # px, height and width of a frame
NUM_FRAMES = 17
FPS = 8

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 45),
    "green": (40, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (222, 190, 30),
    "purple": (165, 55, 195),
    "cyan": (30, 180, 195),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
MOTIONS = (*DIRECTIONS, "still")
BACKGROUNDS: dict[str, tuple[int, int]] = {"dark": (20, 48), "light": (212, 240)}  # lowest and highest grey level

RADIUS = (10.0, 16.0)  # px
TRAVEL = (14.0, 30.0)  # px between the first and the last frame of a moving shape
MARGIN = 1.0  # px always left free at the border
SUPERSAMPLING = 8


class Combination(NamedTuple):
    """What a clip shows, apart from its background."""

    color: str
    shape: str
    motion: str


# Never drawn for training. Each colour, shape and motion, and each pair of them, is still seen in other combinations,
# so a model that draws these has composed them.
HELD_OUT: tuple[Combination, ...] = (
    Combination("red", "circle", "left"),
    Combination("green", "circle", "right"),
    Combination("blue", "circle", "up"),
    Combination("yellow", "circle", "down"),
    Combination("purple", "circle", "still"),
    Combination("blue", "square", "left"),
    Combination("yellow", "square", "right"),
    Combination("purple", "square", "up"),
    Combination("cyan", "square", "down"),
    Combination("red", "square", "still"),
    Combination("purple", "triangle", "left"),
    Combination("cyan", "triangle", "right"),
    Combination("red", "triangle", "up"),
    Combination("green", "triangle", "down"),
    Combination("blue", "triangle", "still"),
)
SPLITS = ("train", "held_out", "all")


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn.

    Attributes:
        color, shape, motion, background: words of this world.
        level: grey level of the background, 0 to 255.
        radius: half the extent of the shape in px.
        start: (x, y) of its centre in the first frame, px.
        travel: px it moves between the first and the last frame (0 if it stands still).
    """

    color: str
    shape: str
    motion: str
    background: str
    level: int
    radius: float
    start: tuple[float, float]
    travel: float


def combinations(split: str) -> list[Combination]:
    """Combinations of a split ("train", "held_out" or "all") in a fixed order.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    every = [Combination(c, s, m) for c in COLORS for s in SHAPES for m in MOTIONS]
    if split == "all":
        return every
    return [c for c in every if (c in HELD_OUT) == (split == "held_out")]


def sample_scene(rng: np.random.Generator, combination: Combination, background: str | None = None) -> Scene:
    """Draw size, start, speed and background at random; the whole shape stays inside the frame for the whole clip."""
    background = background or str(rng.choice(list(BACKGROUNDS)))
    low, high = BACKGROUNDS[background]
    level = int(rng.integers(low, high + 1))
    radius = float(rng.uniform(*RADIUS))
    first, last = radius + MARGIN, SIZE - radius - MARGIN  # where the centre may be on either axis
    travel = 0.0
    if combination.motion in DIRECTIONS:
        travel = float(rng.uniform(TRAVEL[0], min(TRAVEL[1], last - first)))
    start = []
    for step in DIRECTIONS.get(combination.motion, (0, 0)):
        start.append(float(rng.uniform(first + travel * (step < 0), last - travel * (step > 0))))
    return Scene(*combination, background, level, radius, (start[0], start[1]), travel)


def draw_mask(shape: str, center: tuple[float, float], radius: float) -> NDArray[np.float32]:
    """Coverage [64, 64] in [0, 1] of a shape; all shapes span 2 * radius on both axes and differ in area and outline.

    Args:
        shape: "circle", "square" or "triangle" (apex up, base as wide as it is high).
        center: (x, y) in px, the pixel at the top left spans 0 to 1.
        radius: half the extent in px.
    """
    s = SUPERSAMPLING
    image = Image.new("L", (SIZE * s, SIZE * s), 0)
    draw = ImageDraw.Draw(image)
    # Pillow includes the last pixel of a box, hence the -1.
    left, right = (center[0] - radius) * s, (center[0] + radius) * s - 1
    top, bottom = (center[1] - radius) * s, (center[1] + radius) * s - 1
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=255)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=255)
    elif shape == "triangle":
        draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=255)
    else:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(SHAPES)}")
    return (np.asarray(image.reduce(s), dtype=np.float32) / 255).astype(np.float32)


def draw_frame(scene: Scene, time: float) -> NDArray[np.uint8]:
    """One picture [64, 64, 3], uint8, of a scene at ``time`` from 0 (first frame) to 1 (last frame)."""
    dx, dy = DIRECTIONS.get(scene.motion, (0, 0))
    center = (scene.start[0] + dx * scene.travel * time, scene.start[1] + dy * scene.travel * time)
    mask = draw_mask(scene.shape, center, scene.radius)[..., None]
    color = np.array(COLORS[scene.color], dtype=np.float32)
    return np.rint(scene.level * (1 - mask) + color * mask).astype(np.uint8)


def draw_clip(scene: Scene) -> NDArray[np.uint8]:
    """The clip [17, 64, 64, 3], uint8, of a scene."""
    if scene.motion not in DIRECTIONS:
        return np.repeat(draw_frame(scene, 0.0)[None], NUM_FRAMES, axis=0)
    return np.stack([draw_frame(scene, i / (NUM_FRAMES - 1)) for i in range(NUM_FRAMES)])
