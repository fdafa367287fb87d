"""Guidance distillation (arXiv:2210.03142): a student that takes the guidance scales as inputs, and needs one forward
where its teacher needs two, or three with a picture.

It learns the guided velocity at times as in training and at scales drawn anew for each sample. Guidance that oscillates
is a matter of sampling: in the steps where a scale is off, the student is told 1, which is among those that it learns.
An image scale that grows over the latent frames (``scale_temporal_osci``) is told by its top.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config.commands import TrainOptions
from opensora.config.options import opt
from opensora.diffusion.distilled import Distilled
from opensora.diffusion.flow import shifted
from opensora.encoded.config import TrajectoriesConfig
from opensora.encoded.trajectories import TrajectoryInfo
from opensora.training.methods.base import MethodContext
from opensora.training.methods.flow_matching import FlowMatching
from opensora.training.methods.states import state_inputs
from opensora.training.methods.teacher import Teacher, TeacherOptions, check_teacher
from opensora.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillationOptions(TeacherOptions):
    """Of `training_method_config`; guidance and guidance_img are what sampling starts from."""

    guidance_range: tuple[float, float] = opt((1.0, 8.0), "text scales to learn", least=0, most=1000)
    guidance_img_range: tuple[float, float] = opt((1.0, 4.0), "image scales to learn", least=0, most=1000)
    off_share: float = opt(0.1, "share of the samples at which a scale is 1, as in off steps", least=0, most=1)
    scale_temporal_osci: bool = opt(False, "image guidance grows along the frames")


class GuidanceDistillation(FlowMatching):
    """See the module."""

    options = GuidanceDistillationOptions

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        section = context.cfg.dataset
        self.teacher = Teacher(context, context.options.teacher)
        self.tells_image = tells_image(context.plain)
        self.info: TrajectoryInfo | None = None
        if isinstance(section, TrajectoriesConfig):
            assert section.data_path is not None
            self.info = TrajectoryInfo.read(Path(section.data_path))

    @classmethod
    def check(cls, cfg: TrainOptions, options: GuidanceDistillationOptions, model: nn.Module) -> None:
        """A model that takes no scales, scales that cannot be, no teacher."""
        config: Any = model.config
        if not config.guidance_embed:
            raise UserError(
                "training_method guidance_distillation: the student takes the scales as inputs; set "
                "model.guidance_embed=True (and guidance_img_embed=True for that of the image), and "
                "model.strict_load=False to start from a model without"
            )
        for name in ("guidance_range", "guidance_img_range"):
            low, high = getattr(options, name)
            if low > high:
                raise UserError(f"training_method_config.{name}={low, high}: the first must not be above the second")
        if options.scale_temporal_osci and not tells_image(model):
            raise UserError("training_method_config.scale_temporal_osci needs model.guidance_img_embed=True")
        check_teacher(cfg, options)

    def metadata(self) -> dict[str, str]:
        """How the student is to be sampled."""
        options = self.context.options
        return Distilled(
            method="guidance_distillation",
            scales="input",
            guidance=options.guidance,
            guidance_img=options.guidance_img,
            scale_temporal_osci=options.scale_temporal_osci,
        ).metadata()

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The guided velocity at random scales, which the inputs tell."""
        if self.info is None:
            prepared = self.context.encode(batch, generator)
        else:
            prepared = {"inputs": self._kept(batch, self.info, generator), "mask": None}
        inputs = prepared["inputs"]
        count, options = len(inputs["img"]), self.context.options
        text = draw_scales(count, options.guidance_range, options.off_share, generator)
        if self.tells_image:
            image = draw_scales(count, options.guidance_img_range, options.off_share, generator)
        else:
            image = torch.full((count,), 1.0 if options.guidance_img is None else float(options.guidance_img))
        if inputs.get("cond") is None:
            image = torch.ones(count)
        else:
            image = torch.where(inputs["cond"].flatten(1).any(1).cpu(), image, 1.0)
        told = torch.stack([text, image], dim=1).to(inputs["timesteps"].device, torch.float32)
        applied = self._over_frames(told[:, 1], inputs) if options.scale_temporal_osci else told[:, 1]
        return {**prepared, "inputs": {**inputs, "guidance": told}, "target": self.teacher(inputs, told[:, 0], applied)}

    def _over_frames(self, top: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Image scales [B, T] that grow from 1 to ``top`` [B]; scales of at most 1 stay as they are."""
        frames = int(inputs["img_ids"][0, :, 0].max()) + 1
        grown = 1 + torch.linspace(0, 1, frames).to(top) * (top - 1)[:, None]
        return torch.where((top > 1)[:, None], grown, top[:, None])

    def _kept(self, batch: dict[str, Any], info: TrajectoryInfo, generator: torch.Generator) -> dict[str, Any]:
        """States that a guided teacher comes through, but the last."""
        patch, states = self.context.cfg.patch_size, batch["states"]
        frames, height, width = states.shape[3:]
        place = torch.randint(states.shape[1] - 1, (len(states),), generator=generator)
        shift, flow_shift = info.sampling["shift"], info.sampling["flow_shift"]
        times = torch.tensor(shifted(info.positions, height * width // patch**2, frames, shift, flow_shift))[place]
        return state_inputs(batch, states[torch.arange(len(states)), place].float(), times, patch, 1.0)


def tells_image(model: nn.Module) -> bool:
    """Whether a model takes the image scale as an input of its own."""
    return bool(getattr(model.config, "guidance_img_embed", False))


def draw_scales(count: int, bounds: tuple[float, float], off_share: float, generator: torch.Generator) -> Tensor:
    """Scales [B], evenly spread over ``bounds``, but 1 for a share of them."""
    low, high = bounds
    scales = low + (high - low) * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < off_share, 1.0, scales)
