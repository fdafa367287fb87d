"""Trajectory distillation: a student whose every step goes where many guided steps of its teacher go.

The way from noise to data is cut into segments, one per step of the student. It learns the mean velocity of each
segment from the teacher's state at its start: ``(x(end) - x(start)) / (end - start)``, a target in which the teacher's
guidance is contained. Halving the steps again and again, each student the next one's start, is progressive distillation
(arXiv:2202.00512); that each segment is learned for itself is that of phased consistency models (arXiv:2405.18407).
Plain Euler steps sample the student.

States come from trajectories that were sampled beforehand (``dataset.type = "trajectories"``), or are made on the fly
from clips: the state at the start of a segment is a clip with noise, from which the teacher continues to its end.
"""

# ruff: noqa: RUF009 - opt() makes dataclass fields

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config.commands import TrainOptions
from opensora.config.options import opt
from opensora.diffusion.distilled import Distilled, check_positions, even_positions
from opensora.diffusion.flow import shifted
from opensora.diffusion.latents import pack
from opensora.encoded.config import TrajectoriesConfig
from opensora.encoded.trajectories import TrajectoryInfo
from opensora.training.methods.base import MethodContext
from opensora.training.methods.flow_matching import FlowMatching
from opensora.training.methods.states import state_inputs
from opensora.training.methods.teacher import Teacher, TeacherOptions, check_teacher
from opensora.utils.errors import UserError

SAME = 1e-6  # positions that are closer than this are one


@dataclass(frozen=True, kw_only=True)
class TrajectoryDistillationOptions(TeacherOptions):
    """Of `training_method_config`; the scales of sampled trajectories are recorded in their folder."""

    num_steps: int = opt(4, "steps of the student", "steps", least=1, most=1000)
    positions: list[float] | None = opt(
        None, "where they are, falling from 1 to 0 (times before the shift); none: of equal length", least=0, most=1
    )
    shares: list[float] | None = opt(None, "share of the samples by segment, from noise on; none: equal", least=0)
    teacher_steps: int = opt(4, "steps of the teacher in a segment, on the fly", "steps", least=1, most=1000)
    flow_shift: float | None = opt(None, "shift of the times, on the fly; none goes by the sizes", above=0)

    def segments(self) -> tuple[float, ...]:
        """Positions of the student's steps."""
        return tuple(self.positions) if self.positions is not None else even_positions(self.num_steps)


class TrajectoryDistillation(FlowMatching):
    """See the module."""

    options = TrajectoryDistillationOptions
    weighs = False  # times are those of the segments

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        options, section = context.options, context.cfg.dataset
        self.positions = options.segments()
        shares = torch.tensor(options.shares or [1.0] * (len(self.positions) - 1), dtype=torch.float64)
        self.bounds = (shares / shares.sum()).cumsum(0)
        self.info: TrajectoryInfo | None = None
        self.teacher: Teacher | None = None
        if isinstance(section, TrajectoriesConfig):
            assert section.data_path is not None
            self.info = TrajectoryInfo.read(Path(section.data_path))
            self.places = torch.tensor(places_of(self.positions, self.info))
        else:
            self.teacher = Teacher(context, options.teacher)

    @classmethod
    def check(cls, cfg: TrainOptions, options: TrajectoryDistillationOptions, model: nn.Module) -> None:
        """Positions and shares that cannot be, states that were not kept, no teacher."""
        positions = options.segments()
        check_positions(positions, "training_method_config")
        steps = len(positions) - 1
        if options.shares is not None and (len(options.shares) != steps or not sum(options.shares) > 0):
            raise UserError(f"training_method_config.shares={options.shares}: give one for each of {steps} segments")
        if isinstance(cfg.dataset, TrajectoriesConfig):
            if not cfg.dataset.data_path:
                raise UserError("dataset.data_path is not set: give a folder of scripts/diffusion/trajectories.py")
            places_of(positions, TrajectoryInfo.read(Path(cfg.dataset.data_path)))
        else:
            check_teacher(cfg, options)

    def metadata(self) -> dict[str, str]:
        """How the student is to be sampled."""
        return self.distilled().metadata()

    def distilled(self) -> Distilled:
        """The same."""
        options = self.context.options
        found: dict[str, Any] = {"guidance": options.guidance, "guidance_img": options.guidance_img}
        found["flow_shift"] = options.flow_shift
        if self.info is not None:
            names = ("guidance", "guidance_img", "shift", "flow_shift")
            found = {name: self.info.sampling[name] for name in names}
        return Distilled(method="trajectory_distillation", scales="fixed", positions=self.positions, **found)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The state at the start of a segment, and the mean velocity to its end."""
        count = len(batch["index"])
        segment = draw_segments(count, self.bounds, generator)
        return self._kept(batch, segment) if self.info is not None else self._made(batch, segment, generator)

    def times(self, latent_size: tuple[int, ...]) -> Tensor:
        """Of the student's steps in latents (T, h, w): float32 [steps + 1]."""
        patch, distilled = self.context.cfg.patch_size, self.distilled()
        tokens = latent_size[1] * latent_size[2] // patch**2
        return torch.tensor(shifted(self.positions, tokens, latent_size[0], distilled.shift, distilled.flow_shift))

    def _kept(self, batch: dict[str, Any], segment: Tensor) -> dict[str, Any]:
        """From a teacher's trajectories."""
        context, states = self.context, batch["states"]
        patch, size, rows = context.cfg.patch_size, tuple(states.shape[3:]), torch.arange(len(segment))
        times = self.times(size)
        now, after = times[segment], times[segment + 1]
        start, end = (states[rows, self.places[place]].float() for place in (segment, segment + 1))
        inputs = state_inputs(batch, start, now, patch, self.distilled().guidance)
        span = (after - now).to(start)[:, None, None]
        return {"inputs": inputs, "target": pack(end - start, patch) / span, "mask": None}

    def _made(self, batch: dict[str, Any], segment: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """From clips with noise, which the teacher follows through the segment.

        In 16 bits the first time is rounded, once for the mix and for what models are told; further ones are told
        rounded only, as in sampling.
        """
        assert self.teacher is not None
        context, options = self.context, self.context.options
        times = self.times(context.encode.latent_size(batch))
        now, after = times[segment], times[segment + 1]
        prepared = context.encode(batch, generator, now)
        inputs = prepared["inputs"]
        start = x = inputs["img"].float()
        scale = torch.full((len(x),), float(options.guidance))
        scale_img = torch.full((len(x),), 1.0 if options.guidance_img is None else float(options.guidance_img))
        step = (after - now) / options.teacher_steps
        for number in range(options.teacher_steps):
            t = (now + number * step).to(inputs["timesteps"])
            velocity = self.teacher({**inputs, "img": x.to(inputs["img"]), "timesteps": t}, scale, scale_img)
            x = x + step.to(x)[:, None, None] * velocity
        return {**prepared, "target": (x - start) / (after - now).to(x)[:, None, None], "mask": None}


def places_of(positions: tuple[float, ...], info: TrajectoryInfo) -> list[int]:
    """Which of the kept states are at these positions.

    Raises:
        UserError: one is not among them.
    """
    places = []
    for position in positions:
        near = [place for place, kept in enumerate(info.positions) if abs(kept - position) < SAME]
        if not near:
            raise UserError(
                f"training_method_config: the trajectories hold no state at {position:g}, only at "
                f"{', '.join(f'{kept:g}' for kept in info.positions)}; choose num_steps or positions by these"
            )
        places.append(near[0])
    return places


def draw_segments(count: int, bounds: Tensor, generator: torch.Generator) -> Tensor:
    """A segment per sample [B], each as often as its share says (up to one) and in random order.

    Args:
        count: B.
        bounds: shares of the segments, added up: [S].
        generator: of what is random.
    """
    spread = (
        torch.arange(count, dtype=torch.float64) + torch.rand(1, generator=generator, dtype=torch.float64)
    ) / count
    segments = torch.searchsorted(bounds, spread, right=True).clamp(max=len(bounds) - 1)
    return segments[torch.randperm(count, generator=generator)]
