"""What the scenes of the demo world are called: captions in several wordings.

A caption always names colour, shape and motion, mostly the background, now and then the size.
"""

import numpy as np

from tools.demo import synonyms
from tools.demo.world import BOUNCES, DIRECTIONS, Combination, Scene

SMALL, LARGE = 12.0, 14.0  # px: a radius below the first may be called small, above the second large

CHINESE_SHARE = 0.1  # captions in Chinese
EVERYDAY_SHARE = 0.2  # captions in everyday words
PLAIN_SHARE = 0.45  # of the others, captions in the plain wording
BACKGROUND_SHARE = 0.75  # captions that name the background
PERIOD_SHARE = 0.4
CAPITAL_SHARE = 0.4
SIZE_SHARE = 0.3  # captions that name the size, where it is small or large and the wording is not the plain one

TOWARDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "left and right": ("left and right", "from side to side"),
    "up and down": ("up and down",),
}
MOVING = ("moving {}", "moves {}", "is moving {}", "drifts {}", "drifting {}", "slides {}", "sliding {}", "travels {}")
BOUNCING = ("bouncing {}", "bouncing {}", "bounces {}", "moving {}", "moves {}")
STILL = (
    "standing still",
    "stands still",
    "is standing still",
    "stays still",
    "staying in place",
    "is not moving",
    "resting motionless",
)
BEHIND = ("on a {} background", "over a {} background", "against a {} background", "in front of a {} background")


def plain_caption(combination: Combination, background: str | None = None) -> str:
    """The plain wording, e.g. "a red circle moving right", "a red circle bouncing up and down on a dark background"."""
    color, shape, motion = combination
    act = "standing still" if motion == "still" else f"{'bouncing' if motion in BOUNCES else 'moving'} {motion}"
    return f"a {color} {shape} {act}" + (f" on a {background} background" if background else "")


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many captions of a scene, at most 16 words."""
    return caption_and_background(scene, rng)[0]


def caption_and_background(scene: Scene, rng: np.random.Generator) -> tuple[str, str | None]:
    """One of many captions of a scene, and the background if it names that."""
    background = scene.background if rng.random() < BACKGROUND_SHARE else None
    combination, kind = Combination(scene.color, scene.shape, scene.motion), rng.random()
    if kind < CHINESE_SHARE:
        return synonyms.chinese(combination, background, rng) + "。" * bool(rng.random() < PERIOD_SHARE), background
    if kind < CHINESE_SHARE + EVERYDAY_SHARE:
        return _finished(synonyms.english(combination, background, rng), rng), background
    return _usual_caption(scene, background, rng), background


def _usual_caption(scene: Scene, background: str | None, rng: np.random.Generator) -> str:
    if rng.random() < PLAIN_SHARE:
        text = plain_caption(Combination(scene.color, scene.shape, scene.motion), background)
    else:
        text = _varied(scene, background, rng)
    return _finished(text, rng)


def _finished(text: str, rng: np.random.Generator) -> str:
    if rng.random() < CAPITAL_SHARE:
        text = text[0].upper() + text[1:]
    return text + "." * bool(rng.random() < PERIOD_SHARE)


def _varied(scene: Scene, background: str | None, rng: np.random.Generator) -> str:
    size = ""
    if rng.random() < SIZE_SHARE:
        size = "small " if scene.radius < SMALL else str(rng.choice(["large ", "big "])) if scene.radius > LARGE else ""
    subject = f"{rng.choice(['a', 'a', 'one', 'the'])} {size}{scene.color} {scene.shape}"
    if scene.motion in DIRECTIONS:
        act = str(rng.choice(MOVING)).format(rng.choice(TOWARDS[scene.motion]))
    elif scene.motion in BOUNCES:
        act = str(rng.choice(BOUNCING)).format(rng.choice(TOWARDS[scene.motion]))
    else:
        act = str(rng.choice(STILL))
    if background is None:
        return f"{subject} {act}"
    behind = str(rng.choice(BEHIND)).format(background)
    forms = (
        f"{subject} {act} {behind}",
        f"{subject} {behind} {act}",
        f"{background} background, {subject} {act}",
        f"{behind}, {subject} {act}",
        f"{subject} {act}, {background} background",
    )
    return str(rng.choice(forms))
