"""Euler solvers from noise to latents: guided video, and distilled image."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from opensora.acceleration.branch_parallel import spread_branches
from opensora.acceleration.parallel_context import Axis
from opensora.diffusion.guidance import Branch, Guidance, Weights, step_weights

StepCallback = Callable[[int, int, Tensor], None]
"""``on_step(step, total, x)``: called after each step (1 to total) with the tokens so far; may raise to cancel."""

# Branches go through the model as one batch while that has at most so many tokens. Larger batches gain no speed (the
# device is busy anyway) and cost memory.
MAX_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class TextEmbeddings:
    """Embedded prompts of a batch.

    Attributes:
        txt: [B, L_txt, D_txt] token embeddings (T5).
        vec: [B, D_vec] pooled embedding (CLIP).
    """

    txt: Tensor
    vec: Tensor

    def split(self, count: int) -> tuple["TextEmbeddings", "TextEmbeddings"]:
        """The first ``count`` rows, and the rest."""
        return (
            TextEmbeddings(self.txt[:count], self.vec[:count]),
            TextEmbeddings(self.txt[count:], self.vec[count:]),
        )


@torch.no_grad()
def denoise(
    model: nn.Module,
    img: Tensor,  # [B, L, C] packed noise
    img_ids: Tensor,  # [B, L, 3]
    txt_ids: Tensor,  # [B, L_txt, 3]
    prompt: TextEmbeddings,
    negative: TextEmbeddings,
    cond: Tensor | None,  # [B, L, C + p*p] packed condition
    times: Sequence[float],
    guidance: Guidance,
    latent_frames: int,
    has_image: bool = False,
    on_step: StepCallback | None = None,
    branches: Axis | None = None,
) -> Tensor:
    """Sample with two-condition guidance.

    The state is kept in float32 whatever the dtype of the model, so that small steps are not lost to rounding.

    Args:
        model: velocity predictor, ``model(img, img_ids, txt, txt_ids, timesteps, y_vec, cond, guidance)``.
        img: starting noise.
        img_ids: token positions.
        txt_ids: text positions.
        prompt: embedded prompts; the model is called in their dtype.
        negative: embedded negative prompts.
        cond: packed mask and references; None for a model without condition input.
        times: ``num_steps + 1`` falling times, see :func:`opensora.diffusion.flow.get_schedule`.
        guidance: scales.
        latent_frames: T, where L = T * tokens per frame.
        has_image: whether any sample has references. If not, ``cond`` must be zero.
        on_step: progress and cancelling.
        branches: ranks that divide the guidance branches of a step among them; None: one does all.

    Returns:
        Tokens [B, L, C] in float32 at the last time.
    """
    total = len(times) - 1
    tokens_per_frame = img.shape[1] // latent_frames
    x, dtype = img.float(), prompt.txt.dtype
    scale = torch.full((len(img),), guidance.text, device=img.device, dtype=dtype)
    for step, (now, after) in enumerate(itertools.pairwise(times)):
        weights = step_weights(guidance, step, total, latent_frames, has_image)
        rows = [_branch_inputs(branch, prompt, negative, cond) for branch, _ in weights]
        predict = partial(_predict, model, x.to(dtype), img_ids, txt_ids, time=now, guidance=scale)
        predictions = spread_branches(rows, predict, x, branches or Axis())
        velocity = torch.zeros_like(x)
        for prediction, weight in zip(predictions, _spread(weights, tokens_per_frame, x)):
            velocity += weight * prediction
        x = x + (after - now) * velocity
        if on_step is not None:
            on_step(step + 1, total, x)
    return x


@torch.no_grad()
def denoise_distilled(
    model: nn.Module,
    img: Tensor,  # [B, L, C] packed noise
    img_ids: Tensor,  # [B, L, 3]
    txt_ids: Tensor,  # [B, L_txt, 3]
    prompt: TextEmbeddings,
    times: Sequence[float],
    guidance: float,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Sample with a guidance-distilled model: one forward per step, the scale is an input of the model.

    Arguments and result as in :func:`denoise`.
    """
    total = len(times) - 1
    x, dtype = img.float(), prompt.txt.dtype
    scale = torch.full((len(img),), guidance, device=img.device, dtype=dtype)
    for step, (now, after) in enumerate(itertools.pairwise(times)):
        (velocity,) = _predict(model, x.to(dtype), img_ids, txt_ids, [(prompt, None)], now, scale)
        x = x + (after - now) * velocity
        if on_step is not None:
            on_step(step + 1, total, x)
    return x


Row = tuple[TextEmbeddings, Tensor | None]


def _branch_inputs(branch: Branch, prompt: TextEmbeddings, negative: TextEmbeddings, cond: Tensor | None) -> Row:
    if branch is Branch.NEGATIVE_NO_IMAGE and cond is not None:
        cond = torch.zeros_like(cond)
    return (prompt if branch is Branch.PROMPT else negative), cond


def _predict(
    model: nn.Module,
    x: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    rows: list[Row],
    time: float,
    guidance: Tensor,  # [B]
) -> list[Tensor]:
    """One float32 prediction [B, L, C] per row; rows run as one batch if that is small."""
    at_once = len(rows) if len(rows) * x.shape[0] * x.shape[1] <= MAX_TOKENS_AT_ONCE else 1
    predictions: list[Tensor] = []
    for start in range(0, len(rows), at_once):
        group = rows[start : start + at_once]
        n = len(group)
        conds = [cond for _, cond in group if cond is not None]
        batch = model(
            img=torch.cat([x] * n),
            img_ids=torch.cat([img_ids] * n),
            txt=torch.cat([text.txt for text, _ in group]),
            txt_ids=torch.cat([txt_ids] * n),
            timesteps=torch.full((n * len(x),), time, device=x.device, dtype=x.dtype),
            y_vec=torch.cat([text.vec for text, _ in group]),
            cond=torch.cat(conds).to(x.dtype) if conds else None,
            guidance=torch.cat([guidance] * n),
        )
        predictions += batch.float().chunk(n)
    return predictions


def _spread(weights: Weights, tokens_per_frame: int, x: Tensor) -> list[float | Tensor]:
    """Weights as numbers, or per token [1, L, 1] if they differ between latent frames."""
    return [
        weight.to(x).repeat_interleave(tokens_per_frame)[None, :, None] if isinstance(weight, Tensor) else weight
        for _, weight in weights
    ]
