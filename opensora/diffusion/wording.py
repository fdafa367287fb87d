"""What is appended to a prompt before it is encoded, and checks of the values that come with it."""

import math
import numbers
import re
from typing import Any

from opensora.utils.errors import UserError

MOST_LETTERS = 100_000  # encoders take a few thousand
MOST_FPS = 1000
MOST_MOTION = 15  # that language models are asked for; 0 is a still


def check_prompt(text: str, where: str) -> str:
    """The text, unless it is too long for one, or has bytes in it that are no letters; raises a UserError then."""
    if "\0" in text:
        raise UserError(f"{where}: a text cannot hold a zero byte")
    if len(text) > MOST_LETTERS:
        raise UserError(f"{where}: a text of {len(text):,} letters; a prompt has at most {MOST_LETTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {text[error.start : error.end]!r} in the text is no letter (not UTF-8)") from None
    return text


def check_fps(fps: Any, where: str = "") -> float:
    """The frame rate, if it can be one; raises a UserError otherwise."""
    before = f"{where}: " if where else ""
    if not isinstance(fps, int | float) or isinstance(fps, bool):
        raise UserError(f"{before}fps {fps!r} is not a number")
    number = float(fps)
    if not 0 < number <= MOST_FPS:
        raise UserError(f"{before}fps {number:g} must be above 0 and at most {MOST_FPS}")
    return number


def add_fps(text: str, fps: float) -> str:
    """Prompt with ``... 24 FPS.`` at its end, unless it has that already."""
    text = text.strip()
    if text and not text.endswith("."):
        text += "."
    if re.search(r"\d+ FPS\.$", text):
        return text
    return f"{text} {fps:g} FPS.".strip()


def add_motion_score(text: str, score: str) -> str:
    """Prompt with ``... 4 motion score.`` at its end."""
    return f"{text} {score} motion score."


def final_text(text: str, fps: float, motion_score: str | None) -> str:
    """Prompt as the text encoders get it: with frame rate and, if given, motion score."""
    text = add_fps(text, fps)
    return text if motion_score is None else add_motion_score(text, motion_score)


def check_motion_score(score: Any, where: str) -> str | None:
    """The score as text.

    Raises:
        UserError: neither ``dynamic`` nor a number from 0 to :data:`MOST_MOTION`.
    """
    if score is None or str(score).strip() == "":
        return None
    text = str(score).strip()
    if text == "dynamic":
        return text
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: motion_score {text!r} is neither a number nor 'dynamic'") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: motion_score {text!r} is not a finite number")
    if not 0 <= value <= MOST_MOTION:
        raise UserError(f"{where}: motion_score {text} must be at least 0 and at most {MOST_MOTION}")
    return f"{value:g}"


def read_seed(text: str, where: str = "seed") -> int:
    """A seed that a table holds as text, with all of its digits; raises a UserError if it is none."""
    try:
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise UserError(f"{where}: seed {text!r} is not a number") from None
    return check_seed(number, where)


def check_seed(seed: float, where: str = "seed") -> int:
    """The seed as an integer from 0 to 2**63 - 1; raises a UserError otherwise."""
    if not isinstance(seed, numbers.Real) or isinstance(seed, bool):
        raise UserError(f"{where}: seed {seed!r} is not a number")
    if not 0 <= seed < 2**63 or seed != int(seed):
        raise UserError(f"{where}: seed {seed} must be a whole number from 0 to 2**63 - 1")
    return int(seed)
