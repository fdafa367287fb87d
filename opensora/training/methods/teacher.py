"""The teacher of a distillation: a frozen model, or the model in training without its adapters, under guidance."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config.commands import TrainOptions
from opensora.config.options import ModelOptions, Options, opt
from opensora.training.methods.adapters import adapter_shown
from opensora.training.methods.base import MethodContext
from opensora.utils.errors import UserError
from opensora.utils.weights import is_hub_path, open_weights

EMBEDDERS: Mapping[str, str] = MappingProxyType(
    {"guidance_embed": "guidance_in.", "guidance_img_embed": "guidance_img_in."}
)


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Options):
    """Of a `training_method_config` with a teacher."""

    teacher: str | None = opt(None, "its weights; none takes those that the model starts from")
    guidance: float = opt(4.0, "its text guidance scale", least=-1000, most=1000)
    guidance_img: float | None = opt(None, "its image guidance scale; none is 1", least=-1000, most=1000)


def check_teacher(cfg: TrainOptions, options: TeacherOptions) -> None:
    """Raise a UserError if a config has no teacher."""
    if not options.teacher and not (cfg.model and cfg.model.from_pretrained):
        raise UserError(
            f"training_method {cfg.training_method}: there is no teacher; give its weights with "
            "--model.from_pretrained (which the student starts from too) or training_method_config.teacher"
        )
    if options.teacher and not is_hub_path(options.teacher):
        try:
            open_weights(options.teacher)
        except UserError as error:
            raise UserError(f"training_method_config.teacher: {error}") from error


def teacher_section(section: ModelOptions, weights: str | None) -> ModelOptions:
    """The teacher's section: the student's, with other weights if these are given, and without the embedders of scales
    that the teacher's file lacks."""
    changes: dict[str, Any] = {} if weights is None else {"from_pretrained": weights}
    path = weights or section.from_pretrained
    told = [key for key in EMBEDDERS if getattr(section, key, False)]
    shapes = open_weights(path, section.cache_dir).shapes if path and told else {}
    lacking = [key for key in told if not any(name.startswith(EMBEDDERS[key]) for name in shapes)]
    return replace(section, **changes | dict.fromkeys(lacking, False))


class Teacher:
    """Velocities of two-condition guidance (see :mod:`opensora.diffusion.guidance`), each sample at its own time and
    scales.

    Where the model in training is a LoRA adapter and no other weights are given, the teacher is the same model without
    it, and needs no memory of its own.

    Args:
        context: of the method.
        weights: file of the teacher; None takes what the model started from.
    """

    def __init__(self, context: MethodContext, weights: str | None = None) -> None:
        self.context = context
        self.shares_base = bool(context.cfg.lora_config) and weights is None
        if self.shares_base:
            self.model: nn.Module = context.model
        else:
            section = context.cfg.model
            assert section is not None
            self.model = context.run.build(teacher_section(section, weights)).eval().requires_grad_(False)
        self.empty_txt, self.empty_vec = context.encode.empty_text

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], text: Tensor, image: Tensor) -> Tensor:
        """Guided velocity.

        Args:
            inputs: of the model, as :class:`InputEncoder` makes them: [B, ...].
            text: scale of the prompt [B].
            image: scale of the picture [B], or [B, T] by latent frame; without effect on samples that have none.

        Returns:
            [B, L, C] float32.
        """
        with self._alone():
            return guided(self.model, inputs, self.empty_txt, self.empty_vec, text, image)

    @torch.no_grad()
    def at(self, inputs: Mapping[str, Any], text: float, image: float | None) -> Tensor:
        """The same at one scale each for all samples (None is 1). Where both are 1, that is one forward pass."""
        image = 1.0 if image is None else image
        if text == image == 1:
            with self._alone():
                return self.model(**inputs).float()
        count = len(inputs["img"])
        return self(inputs, torch.full((count,), float(text)), torch.full((count,), float(image)))

    def _alone(self) -> AbstractContextManager[None]:
        """Without the adapter in training."""
        return adapter_shown(self.context.plain, None) if self.shares_base else nullcontext()


def guided(
    model: nn.Module, inputs: Mapping[str, Any], empty_txt: Tensor, empty_vec: Tensor, text: Tensor, image: Tensor
) -> Tensor:
    """See :class:`Teacher`. Samples without a picture need no third forward."""
    cond, count = inputs.get("cond"), len(inputs["img"])
    with_text = dict(inputs)
    without = {**inputs, "txt": empty_txt.expand_as(inputs["txt"]), "y_vec": empty_vec.expand_as(inputs["y_vec"])}
    pictured = [] if cond is None else torch.nonzero(cond.flatten(1).any(1)).flatten().tolist()
    parts = [with_text, without]
    if pictured:
        parts.append({key: value[pictured] for key, value in without.items() if value is not None})
        parts[-1]["cond"] = torch.zeros_like(parts[-1]["cond"])
    joined = {key: torch.cat([part[key] for part in parts]) for key in with_text if with_text[key] is not None}
    c, u, *rest = model(**joined).float().split([count, count, *([len(pictured)] if pictured else [])])
    wide = text.to(c)[:, None, None]
    velocity = u + wide * (c - u)
    if pictured:
        scale = image.to(c)[pictured]
        scale = scale if scale.ndim == 2 else scale[:, None]  # [P, T], or [P, 1]
        per_token = scale.repeat_interleave(c.shape[1] // scale.shape[1], dim=1)[..., None]
        velocity[pictured] += (per_token - 1) * (u[pictured] - rest[0])
    return velocity
