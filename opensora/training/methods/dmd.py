"""Distribution matching distillation, DMD2 (arXiv:2405.14867), without its optional adversarial loss.

The student makes data in a few steps; its distribution, not each of its trajectories, is to be the teacher's. The
gradient of what it makes is the difference of two scores of the noised result: of the guided teacher, and of a fake
score that learns what the student makes by flow matching. The fake score is updated in every optimizer step, the
student in every ``fake_updates``-th. Its inputs are those that it has when it is sampled: the few steps are run from
noise, up to one of them (backward simulation).

Each step predicts the data and noises it again to the next time: the solver ``renoise`` samples the student.

With ``lora_config`` student and fake score are two adapters on one frozen model, which without them is the teacher.
"""

# ruff: noqa: RUF009 - opt() and section() make dataclass fields

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config.commands import TrainOptions
from opensora.config.options import OptimOptions, opt, section
from opensora.datasets.dataloader import to_device
from opensora.diffusion.distilled import Distilled, check_positions, even_positions
from opensora.diffusion.flow import shift_alpha, shifted, time_shift
from opensora.encoded.config import TrajectoriesConfig
from opensora.training.methods.adapters import FurtherAdapter
from opensora.training.methods.base import MethodContext, TrainingMethod
from opensora.training.methods.states import state_inputs
from opensora.training.methods.teacher import Teacher, TeacherOptions, check_teacher, teacher_section
from opensora.training.roles import MODEL, Turn
from opensora.utils.errors import UserError

FAKE = "fake"
SMALLEST = 1e-6  # of what the student's gradient is divided by


@dataclass(frozen=True, kw_only=True)
class DmdOptions(TeacherOptions):
    """Of `training_method_config`."""

    num_steps: int = opt(4, "steps of the student", "steps", least=1, most=1000)
    positions: list[float] | None = opt(
        None, "where they are, falling from 1 to 0 (times before the shift); none: of equal length", least=0, most=1
    )
    flow_shift: float | None = opt(None, "shift of the times; none goes by the sizes", above=0)
    fake_updates: int = opt(5, "optimizer steps of the fake score for one of the student", least=1, most=1000)
    fake_optim: OptimOptions = section(OptimOptions, "optimizer of the fake score", {}, open=True)
    score_times: tuple[float, float] = opt(
        (0.02, 0.98), "where both scores are compared (times before the shift)", least=0, most=1
    )

    def steps(self) -> tuple[float, ...]:
        """Positions of the student's steps."""
        return tuple(self.positions) if self.positions is not None else even_positions(self.num_steps)


class DistributionMatching(TrainingMethod):
    """See the module."""

    options = DmdOptions
    adds_adapters = True
    weighs = False

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        options = context.options
        self.positions = options.steps()
        self.teacher = Teacher(context, options.teacher)
        self.roles = [context.role(FAKE, self._fake(), options.fake_optim)]

    def _fake(self) -> nn.Module:
        context = self.context
        if self.teacher.shares_base:
            return FurtherAdapter(context.plain, context.cfg.lora_config or {}, FAKE)
        assert context.cfg.model is not None
        chosen = teacher_section(context.cfg.model, context.options.teacher)
        return context.run.build(chosen, torch_dtype=context.run.master_dtype).train()

    @classmethod
    def check(cls, cfg: TrainOptions, options: DmdOptions, model: nn.Module) -> None:
        """Positions and times that cannot be, no teacher."""
        check_positions(options.steps(), "training_method_config")
        low, high = options.score_times
        if not 0 < low < high:
            raise UserError(f"training_method_config.score_times={low, high}: give two numbers that rise, above 0")
        if cfg.lora_config and options.teacher:
            raise UserError(
                "training_method_config.teacher with lora_config: the adapters' base is the teacher; leave one out"
            )
        check_teacher(cfg, options)

    def metadata(self) -> dict[str, str]:
        """How the student is to be sampled."""
        options = self.context.options
        return Distilled(
            method="dmd",
            scales="fixed",
            guidance=options.guidance,
            guidance_img=options.guidance_img,
            positions=self.positions,
            flow_shift=options.flow_shift,
            solver="renoise",
        ).metadata()

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> Iterator[Turn]:
        """The student's turn in every ``fake_updates``-th step, the fake score's in each."""
        context = self.context
        with context.timer("encode"):
            moved = to_device(dict(batch), context.run.device, context.run.dtype)
            inputs, size = self._inputs(moved, generator)
        times = self._times(size)
        shape = inputs["img"].shape
        student_turn = context.run.states.global_step % context.options.fake_updates == 0

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator).to(inputs["img"].device, torch.float32)

        chosen = int(torch.randint(len(times) - 1, (1,), generator=generator))
        with context.timer("forward"), torch.no_grad():
            state = self._simulate(inputs, times[: chosen + 1], noise)
        with context.timer("forward"), torch.set_grad_enabled(student_turn):
            made = self._data(context.model, inputs, state, times[chosen])
        if student_turn:
            with context.timer("forward"):
                loss, metrics = self._student_loss(made, inputs, noise(), self._score_times(len(made), size, generator))
            yield Turn(MODEL, loss, metrics)
        data = made.detach()
        with context.timer("forward"):
            loss = self._fake_loss(data, inputs, noise(), self._score_times(len(data), size, generator))
        yield Turn(FAKE, loss, {"fake_loss": loss.detach(), **context.timer.take()})

    def _inputs(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Text, positions and condition of a batch, and (T, h, w); what it shows is not needed."""
        context = self.context
        if isinstance(context.cfg.dataset, TrajectoriesConfig):
            states = batch["states"]
            ones = torch.ones(len(states))
            inputs = state_inputs(batch, states[:, 0], ones, context.cfg.patch_size, float(context.options.guidance))
            return inputs, tuple(states.shape[3:])
        size = context.encode.latent_size(batch)
        return context.encode(batch, generator)["inputs"], size

    def _alpha(self, size: tuple[int, ...]) -> float:
        tokens = size[1] * size[2] // self.context.cfg.patch_size**2
        return shift_alpha(tokens, size[0], self.context.options.flow_shift)

    def _times(self, size: tuple[int, ...]) -> list[float]:
        tokens = size[1] * size[2] // self.context.cfg.patch_size**2
        return shifted(self.positions, tokens, size[0], True, self.context.options.flow_shift)

    def _score_times(self, count: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        low, high = self.context.options.score_times
        return time_shift(self._alpha(size), low + (high - low) * torch.rand(count, generator=generator))

    def _simulate(self, inputs: Mapping[str, Any], times: list[float], noise: Callable[[], Tensor]) -> Tensor:
        """What the student has before its step from the last of ``times``, when it has come there from noise."""
        state = noise()
        for now, after in itertools.pairwise(times):
            state = (1 - after) * self._data(self.context.model, inputs, state, now) + after * noise()
        return state

    def _data(self, model: nn.Module, inputs: Mapping[str, Any], state: Tensor, time: float) -> Tensor:
        """The data that a model sees in a state [B, L, C] at one time."""
        times = torch.full((len(state),), time, device=state.device)
        given = {**inputs, "img": state.to(inputs["img"]), "timesteps": times.to(inputs["timesteps"])}
        return state - time * model(**given).float()

    def _student_loss(
        self, made: Tensor, inputs: Mapping[str, Any], noise: Tensor, times: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared distance to where the scores' difference points (arXiv:2405.14867, eq. 1)."""
        options = self.context.options
        state, wide, given = noised(made.detach(), noise, times, inputs)
        scales = [1.0 if s is None else float(s) for s in (options.guidance, options.guidance_img)]
        with torch.no_grad():
            real = state - wide * self.teacher(given, *(torch.full((len(made),), s) for s in scales))
            fake = state - wide * self.roles[0].engine.model(**given).float()
            away = (made - real).abs().mean((1, 2), keepdim=True).clamp(min=SMALLEST)
            gradient = (fake - real) / away
            target = made - gradient
        loss = 0.5 * (made - target).square().mean()
        return loss, {"score_difference": (fake - real).square().mean()}

    def _fake_loss(self, data: Tensor, inputs: Mapping[str, Any], noise: Tensor, times: Tensor) -> Tensor:
        """Flow matching on what the student has made."""
        given = noised(data, noise, times, inputs)[2]
        return (self.roles[0].engine.model(**given).float() - (noise - data)).square().mean()


def noised(
    data: Tensor, noise: Tensor, times: Tensor, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Data [B, L, C] with noise at drawn times [B]: the state, its times [B, 1, 1], and what a model is given of it.

    In 16 bits the times are rounded, once for the mix and for the model. (Those of the student's own steps are not: it
    sees states as the solver comes to them, whose times only the model is told rounded.)
    """
    told = times.to(inputs["timesteps"])
    wide = told.to(noise)[:, None, None]
    state = (1 - wide) * data + wide * noise
    return state, wide, {**inputs, "img": state.to(inputs["img"]), "timesteps": told}
