"""Classifier-free guidance with text and image, as weights over distinct branches.

With the prediction ``c`` (prompt, image), ``u`` (negative prompt, image) and ``u2`` (negative prompt, no image), the
guided velocity of two-condition guidance (Brooks et al. 2023, arXiv:2211.09800, eq. 3, in the order image then text) is

    u2 + g_img (u - u2) + g_txt (c - u)  =  g_txt c + (g_img - g_txt) u + (1 - g_img) u2

So a step is a weighted sum. Branches with equal inputs are one branch with the sum of their weights (without an image
``u`` and ``u2`` are), and a branch of weight zero need not be run (on an oscillating step both scales are 1 and ``c``
alone is left). Nothing is approximated.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

FORCED_STEPS = 10


class Branch(Enum):
    """What a forward of the model is given."""

    PROMPT = "prompt, image"
    NEGATIVE = "negative prompt, image"
    NEGATIVE_NO_IMAGE = "negative prompt, no image"


Weights = list[tuple[Branch, float | Tensor]]


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of a sampling run.

    Attributes:
        text: scale of the prompt, g_txt; 1 turns it off.
        image: scale of the image condition, g_img; 1 turns it off. Without effect when there is no image.
        text_osci: let the text scale oscillate, see :func:`oscillate`.
        image_osci: let the image scale oscillate.
        scale_temporal_osci: let the image scale grow over the latent frames, see :func:`image_scale`. Only meant for
            ``i2v_*`` conditions.
    """

    text: float = 7.5
    image: float = 3.0
    text_osci: bool = False
    image_osci: bool = False
    scale_temporal_osci: bool = False


def is_on(step: int, forced_steps: int = FORCED_STEPS) -> bool:
    """Whether an oscillating scale is on at a step: during the first steps, and on even ones after."""
    return step < forced_steps or step % 2 == 0


def oscillate(scale: float, step: int, forced_steps: int = FORCED_STEPS) -> float:
    """``scale`` at steps where it is on, 1 (no guidance) at the others."""
    return scale if is_on(step, forced_steps) else 1.0


def image_scale(guidance: Guidance, step: int, num_steps: int, latent_frames: int) -> float | Tensor:
    """Image scale of a step: a number, or one per latent frame [T].

    With ``scale_temporal_osci`` it runs from 1 at the first frame (the given picture needs no guidance) to a top at
    the last one; the top falls evenly over the steps, from the scale itself towards 1.
    """
    scale = oscillate(guidance.image, step) if guidance.image_osci else guidance.image
    if not guidance.scale_temporal_osci or scale <= 1:
        return scale
    top = scale + (1 - scale) * step / num_steps
    return torch.linspace(1, top, latent_frames)


def step_weights(guidance: Guidance, step: int, num_steps: int, latent_frames: int, has_image: bool) -> Weights:
    """Branches to run at a step and their weights.

    Args:
        guidance: scales.
        step: 0 to ``num_steps`` - 1.
        num_steps: steps of the run.
        latent_frames: T.
        has_image: whether any sample of the batch has an image or video condition.

    Returns:
        Distinct branches whose weight is not zero. The weights, numbers or one per latent frame [T], sum to 1.
    """
    text = oscillate(guidance.text, step) if guidance.text_osci else guidance.text
    weights: Weights
    if has_image:
        image = image_scale(guidance, step, num_steps, latent_frames)
        weights = [(Branch.PROMPT, text), (Branch.NEGATIVE, image - text), (Branch.NEGATIVE_NO_IMAGE, 1 - image)]
    else:
        weights = [(Branch.PROMPT, text), (Branch.NEGATIVE, 1 - text)]
    return [(branch, weight) for branch, weight in weights if not _is_zero(weight)]


def phase(guidance: Guidance, step: int, has_image: bool) -> tuple[bool, bool]:
    """Whether the text and the image scale are on at a step.

    At steps of equal phase the guided velocity is one field, which changes with the step at most slowly
    (``scale_temporal_osci``); between phases it jumps.
    """
    return not guidance.text_osci or is_on(step), has_image and (not guidance.image_osci or is_on(step))


def count_forwards(guidance: Guidance, num_steps: int, has_image: bool, evaluated: Iterable[int] | None = None) -> int:
    """Forwards per sample of a whole run (T > 1).

    Args:
        guidance, num_steps, has_image: as in :func:`step_weights`.
        evaluated: the step of each evaluation of the guided velocity; every step once if None.
    """
    steps = range(num_steps) if evaluated is None else evaluated
    return sum(len(step_weights(guidance, step, num_steps, 2, has_image)) for step in steps)


def _is_zero(weight: float | Tensor) -> bool:
    return not weight.any() if isinstance(weight, Tensor) else weight == 0
