"""The small world that the demo model learns: one coloured shape that moves, or not, on a dark or a light background.

Everything that defines the world is here: its words, the combinations kept out of training, how a scene is drawn and
how it is described. A frame is 64x64 pixels, a clip 17 frames at 8 frames per second; what stands still or bounces off
the border may go on for longer.
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
BOUNCES: dict[str, tuple[int, int]] = {"left and right": (1, 0), "up and down": (0, 1)}  # to and fro
SHORT_MOTIONS = (*DIRECTIONS, "still")  # of clips of 17 frames
MOTIONS = (*SHORT_MOTIONS, *BOUNCES)
BACKGROUNDS: dict[str, tuple[int, int]] = {"dark": (20, 48), "light": (212, 240)}  # lowest and highest grey level

RADIUS = (10.0, 16.0)  # px
TRAVEL = (14.0, 30.0)  # px that a moving shape covers in 17 frames
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
SPLITS = ("train", "held_out", "all", "long")


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn.

    Attributes:
        color, shape, motion, background: words of this world.
        level: grey level of the background, 0 to 255.
        radius: half the extent of the shape in px.
        start: (x, y) of its centre in the first frame, px.
        travel: px it moves in 17 frames (0 if it stands still); below 0 if one that bounces first moves left or up.
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
    """Combinations of a split in a fixed order: "train", "held_out" or "all" of the motions of short clips, or "long",
    those that can go on for any time.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    motions = ("still", *BOUNCES) if split == "long" else SHORT_MOTIONS
    every = [Combination(c, s, m) for c in COLORS for s in SHAPES for m in motions]
    if split == "long":
        return [c for c in every if c not in HELD_OUT]
    if split == "all":
        return every
    return [c for c in every if (c in HELD_OUT) == (split == "held_out")]


def sample_scene(rng: np.random.Generator, combination: Combination, background: str | None = None) -> Scene:
    """Draw size, start, speed and background at random; the whole shape stays inside the frame for the whole clip."""
    background = background or str(rng.choice(list(BACKGROUNDS)))
    low, high = BACKGROUNDS[background]
    level = int(rng.integers(low, high + 1))
    radius = float(rng.uniform(*RADIUS))
    first, last = room(radius)
    travel = 0.0
    if combination.motion != "still":
        travel = float(rng.uniform(TRAVEL[0], min(TRAVEL[1], last - first)))
    if combination.motion in BOUNCES:
        travel *= float(rng.choice([-1, 1]))
    start = []
    for step in DIRECTIONS.get(combination.motion, (0, 0)):
        start.append(float(rng.uniform(first + travel * (step < 0), last - travel * (step > 0))))
    return Scene(*combination, background, level, radius, (start[0], start[1]), travel)


def room(radius: float) -> tuple[float, float]:
    """Least and greatest coordinate, px, of the centre of a shape of this radius, on either axis."""
    return radius + MARGIN, SIZE - radius - MARGIN


def reflect(position: float, least: float, greatest: float) -> float:
    """A coordinate that turned back wherever it reached the least or the greatest."""
    span = greatest - least
    past = (position - least) % (2 * span)
    return least + min(past, 2 * span - past)


def center_of(scene: Scene, time: float) -> tuple[float, float]:
    """Where a scene's shape is, (x, y) in px, at ``time``: 1 at the 17th frame."""
    if scene.motion not in BOUNCES:
        dx, dy = DIRECTIONS.get(scene.motion, (0, 0))
        return scene.start[0] + dx * scene.travel * time, scene.start[1] + dy * scene.travel * time
    step = BOUNCES[scene.motion]
    x, y = (reflect(at + d * scene.travel * time, *room(scene.radius)) for at, d in zip(scene.start, step, strict=True))
    return x, y


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
    """One picture [64, 64, 3], uint8, of a scene at ``time``: 0 for the first frame, 1 for the 17th."""
    mask = draw_mask(scene.shape, center_of(scene, time), scene.radius)[..., None]
    color = np.array(COLORS[scene.color], dtype=np.float32)
    return np.rint(scene.level * (1 - mask) + color * mask).astype(np.uint8)


def draw_clip(scene: Scene, num_frames: int = NUM_FRAMES) -> NDArray[np.uint8]:
    """The clip [num_frames, 64, 64, 3], uint8, of a scene; more than 17 frames where the motion goes on."""
    if scene.motion == "still":
        return np.repeat(draw_frame(scene, 0.0)[None], num_frames, axis=0)
    return np.stack([draw_frame(scene, i / (NUM_FRAMES - 1)) for i in range(num_frames)])
