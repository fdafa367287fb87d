"""The velocity that a solver follows, made once per run from a model, its inputs and guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from opensora.acceleration.branch_parallel import own_rows, spread_branches
from opensora.acceleration.lockstep import Lockstep
from opensora.acceleration.parallel_context import Axis
from opensora.diffusion.guidance import Branch, Guidance, Weights, image_scale, oscillate, step_weights
from opensora.diffusion.reuse import Evaluation, SampleMemo
from opensora.diffusion.solvers import Velocity
from opensora.diffusion.step_cache import StepCache
from opensora.models.diffusion import as_diffusion_model

# Branches go through the model as one batch while that has at most so many tokens. Larger batches gain no speed (the
# device is busy anyway) and cost memory.
MAX_TOKENS_AT_ONCE = 8192
Scale = float | tuple[float, float]


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

    def chunks(self, count: int) -> list["TextEmbeddings"]:
        """All rows, ``count`` at a time."""
        return [TextEmbeddings(txt, vec) for txt, vec in zip(self.txt.split(count), self.vec.split(count))]


Rows = Sequence[tuple[Branch, TextEmbeddings]]
"""Guidance branches of one evaluation, each with its text."""

Coming = tuple[float, Scale, Rows]
"""An evaluation to come: time, the scale that the model is told, branches on this rank."""


@dataclass(frozen=True)
class Denoiser:
    """A model and what it is given at every step of a run.

    Attributes:
        model: velocity predictor, ``model(img, img_ids, txt, txt_ids, timesteps, y_vec, cond, guidance)``; called in
            the dtype of the prompts.
        img_ids: [B, L, 3] token positions.
        txt_ids: [B, L_txt, 3] text positions.
        cond: [B, L, C + p*p] packed mask and references; None for a model without condition input.
        cache: reuses work of earlier evaluations; None runs all blocks every time.
        memo: gives what is computed once per sample; None computes it every time.
        together: takes branches that are no one batch through the model side by side; None: one after another.
    """

    model: nn.Module
    img_ids: Tensor
    txt_ids: Tensor
    cond: Tensor | None = None
    cache: StepCache | None = None
    memo: SampleMemo | None = None
    together: Lockstep | None = None

    def predict(self, x: Tensor, time: float, step: int, scale: Scale, rows: Rows) -> list[Tensor]:
        """One float32 prediction [B, L, C] per branch; branches run as one batch if that is small.

        Args:
            x: [B, L, C].
            time: diffusion time, the same for all.
            step: whose guidance is asked for, for the cache.
            scale: guidance scale, for models that embed it; that of the text and that of the image, for models that
                embed both.
            rows: each branch with its text.
        """
        batches = at_once(rows, x.shape[0] * x.shape[1])
        forwards = [partial(self._forward, x, time, step, scale, batch) for batch in batches]
        selects = [partial(self._select, time, scale, batch) for batch in batches]
        return [prediction for batch in self._run(forwards, selects) for prediction in batch]

    def _run(
        self, forwards: Sequence[Callable[[], Sequence[Tensor]]], selects: Sequence[Callable[[], None]]
    ) -> list[Sequence[Tensor]]:
        """Forwards one after another, or side by side where they share the stay of each block on the device."""
        if self.together is not None:
            return self.together.run(forwards, selects)
        return [(select(), forward())[1] for select, forward in zip(selects, forwards)]

    def _select(self, time: float, scale: Scale, rows: Rows) -> None:
        """Tell the memo which evaluation the next forward is."""
        if self.memo is not None:
            key = evaluation_of(time, scale, rows)
            self.memo.select(key, lambda: self._modulation_input(key, rows))

    def foresee(self, coming: Sequence[Coming], tokens: int) -> None:
        """Have the memo compute all evaluations to come at once; see :func:`evaluations_of` for the arguments."""
        assert self.memo is not None
        known = evaluations_of(coming, tokens)
        self.memo.foresee({key: self._modulation_input(key, rows) for key, rows in known.items()})

    @torch.no_grad()
    def _modulation_input(self, evaluation: Evaluation, rows: Rows) -> Tensor:
        model = as_diffusion_model(self.model)
        return model.modulation_input(**self._vector_inputs(evaluation.time, evaluation.scale, rows))

    def _vector_inputs(self, time: float, scale: Scale, rows: Rows) -> dict[str, Tensor]:
        """Arguments of the model, but for what is made of tokens."""
        vec = torch.cat([text.vec for _, text in rows])
        count, dtype, device = len(vec), rows[0][1].txt.dtype, vec.device
        return {
            "timesteps": torch.full((count,), time, device=device, dtype=dtype),
            "y_vec": vec,
            "guidance": torch.tensor([scale] * count, device=device, dtype=dtype),
        }

    def _forward(self, x: Tensor, time: float, step: int, scale: Scale, rows: Rows) -> Sequence[Tensor]:
        n, dtype = len(rows), rows[0][1].txt.dtype
        cached = {}
        if self.cache is not None:
            names = tuple(branch.name.lower() for branch, _ in rows)
            cached["around"] = partial(self.cache.around_blocks, branch=names, step=step)
        batch = self.model(
            img=torch.cat([x.to(dtype)] * n),
            img_ids=torch.cat([self.img_ids] * n),
            txt=torch.cat([text.txt for _, text in rows]),
            txt_ids=torch.cat([self.txt_ids] * n),
            cond=None if self.cond is None else torch.cat([self._cond(branch) for branch, _ in rows]).to(dtype),
            **self._vector_inputs(time, scale, rows),
            **cached,
        )
        return batch.float().chunk(n)

    def _cond(self, branch: Branch) -> Tensor:
        assert self.cond is not None
        return torch.zeros_like(self.cond) if branch is Branch.NEGATIVE_NO_IMAGE else self.cond


def at_once(rows: Rows, tokens: int) -> list[Rows]:
    """The branches of an evaluation in the batches that go through the model, each of ``tokens`` image tokens."""
    size = len(rows) if len(rows) * tokens <= MAX_TOKENS_AT_ONCE else 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluation_of(time: float, scale: Scale, rows: Rows) -> Evaluation:
    """What tells the modulation of a batch from that of another."""
    return Evaluation(time, scale, tuple(id(text) for _, text in rows))


def evaluations_of(coming: Sequence[Coming], tokens: int) -> dict[Evaluation, Rows]:
    """The different batches that go through the model in a run.

    Args:
        coming: its evaluations.
        tokens: image tokens of a branch, all samples together.
    """
    batches = [(time, scale, batch) for time, scale, rows in coming for batch in at_once(rows, tokens)]
    return {evaluation_of(*each): each[2] for each in batches}


def guided_rows(
    prompt: TextEmbeddings,
    negative: TextEmbeddings,
    guidance: Guidance,
    num_steps: int,
    latent_frames: int,
    has_image: bool = False,
    branches: Axis | None = None,
) -> Callable[[int], Rows]:
    """From a step to the branches that this rank runs in it; arguments as of :func:`guided_velocity`."""
    texts = {Branch.PROMPT: prompt, Branch.NEGATIVE: negative, Branch.NEGATIVE_NO_IMAGE: negative}

    def rows(step: int) -> Rows:
        weights = step_weights(guidance, step, num_steps, latent_frames, has_image)
        return own_rows([(branch, texts[branch]) for branch, _ in weights], branches or Axis())

    return rows


def guided_velocity(
    denoiser: Denoiser,
    prompt: TextEmbeddings,
    negative: TextEmbeddings,
    guidance: Guidance,
    num_steps: int,
    latent_frames: int,
    has_image: bool = False,
    branches: Axis | None = None,
) -> Velocity:
    """Velocity of two-condition guidance, see :mod:`opensora.diffusion.guidance`.

    Args:
        denoiser: the model and its inputs.
        prompt: embedded prompts.
        negative: embedded negative prompts.
        guidance: scales.
        num_steps: steps of the run.
        latent_frames: T, where L = T * tokens per frame.
        has_image: whether any sample has references. If not, the condition must be zero.
        branches: ranks that divide the guidance branches of an evaluation among them; None: one does all.
    """
    texts = {Branch.PROMPT: prompt, Branch.NEGATIVE: negative, Branch.NEGATIVE_NO_IMAGE: negative}

    def velocity(x: Tensor, t: float, step: int) -> Tensor:
        weights = step_weights(guidance, step, num_steps, latent_frames, has_image)
        rows = [(branch, texts[branch]) for branch, _ in weights]
        predict = partial(denoiser.predict, x, t, step, guidance.text)
        predictions = spread_branches(rows, predict, x, branches or Axis())
        total = torch.zeros_like(x)
        for prediction, weight in zip(predictions, _per_token(weights, x.shape[1] // latent_frames, x)):
            total += weight * prediction
        return total

    return torch.no_grad()(velocity)


def holding(velocity: Velocity, mask: Tensor, given: Tensor) -> Velocity:
    """A velocity that leads what is given to itself, along the straight line from the noise it started from.

    So the model sees it at the noise of every step, and need not know the condition by its mask: training-free
    inpainting, as in RePaint (arXiv:2201.09865, without its resampling) and Blended Latent Diffusion
    (arXiv:2206.02779).

    Args:
        velocity: of everything.
        mask: [B, L, C], not 0 where something is given.
        given: [B, L, C], what is.
    """

    def held(x: Tensor, t: float, step: int) -> Tensor:
        return torch.where(mask != 0, (x - given.to(x)) / max(t, 1e-6), velocity(x, t, step))

    return torch.no_grad()(held)


def distilled_velocity(denoiser: Denoiser, prompt: TextEmbeddings, scale: float) -> Velocity:
    """Velocity of a guidance-distilled model: one forward, the scale is an input of the model."""

    def velocity(x: Tensor, t: float, step: int) -> Tensor:
        (prediction,) = denoiser.predict(x, t, step, scale, [(Branch.PROMPT, prompt)])
        return prediction

    return torch.no_grad()(velocity)


def told_velocity(
    denoiser: Denoiser,
    prompt: TextEmbeddings,
    guidance: Guidance,
    num_steps: int,
    latent_frames: int,
    has_image: bool = False,
) -> Velocity:
    """Velocity of a model that takes the scales of text and image of each step as input; arguments as of
    :func:`guided_velocity`. Where scales oscillate, it is told 1 in their off steps.

    An image scale that grows over the latent frames is told by its top.
    """

    def velocity(x: Tensor, t: float, step: int) -> Tensor:
        scales = told_scales(guidance, step, num_steps, latent_frames, has_image)
        (prediction,) = denoiser.predict(x, t, step, scales, [(Branch.PROMPT, prompt)])
        return prediction

    return torch.no_grad()(velocity)


def told_scales(
    guidance: Guidance, step: int, num_steps: int, latent_frames: int, has_image: bool = False
) -> tuple[float, float]:
    """Scales of text and image that :func:`told_velocity` tells the model in a step."""
    text = oscillate(guidance.text, step) if guidance.text_osci else guidance.text
    image = image_scale(guidance, step, num_steps, latent_frames) if has_image else 1.0
    return text, float(image[-1]) if isinstance(image, Tensor) else image


def _per_token(weights: Weights, tokens_per_frame: int, x: Tensor) -> list[float | Tensor]:
    """Weights as numbers, or per token [1, L, 1] if they differ between latent frames."""
    return [
        weight.to(x).repeat_interleave(tokens_per_frame)[None, :, None] if isinstance(weight, Tensor) else weight
        for _, weight in weights
    ]
