"""Distribution matching distillation, DMD2 (arXiv:2405.14867), without its optional adversarial loss.

The student makes data in a few steps; its distribution, not each of its trajectories, is to be the teacher's. The
gradient of what it makes is the difference of two scores of the noised result: of the guided teacher, and of a fake
score that learns what the student makes by flow matching. The fake score is updated in every optimizer step, the
student in every ``fake_updates``-th. Its inputs are those that it has when it is sampled: the few steps are run from
noise, each sample up to one of them (backward simulation). All steps are equally often the last one, within a batch
where it is large enough, so that the fake score sees what comes of all of them.

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
from opensora.training.loop import step_generator
from opensora.training.methods.adapters import FurtherAdapter
from opensora.training.methods.base import METHOD_SEED, MethodContext, TrainingMethod
from opensora.training.methods.states import state_inputs
from opensora.training.methods.teacher import Teacher, TeacherOptions, check_teacher, teacher_section
from opensora.training.roles import MODEL, Turn
from opensora.training.weights.optimizer import check_settings
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
    fake_warmup: int = opt(0, "optimizer steps of the fake score before the student's first", "steps", least=0)
    fake_updates: int = opt(5, "optimizer steps of the fake score for one of the student", least=1, most=1000)
    fake_optim: OptimOptions = section(OptimOptions, "optimizer of the fake score", {}, open=True)
    score_times: tuple[float, float] = opt(
        (0.02, 0.98), "where both scores are compared (times before the shift)", least=0, most=1
    )
    score_shift: float | None = opt(None, "shift of these times; none: that of the steps", above=0)

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
        check_settings(options.fake_optim, "training_method_config.fake_optim")
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
        times, stream = self._times(size), stream_on(inputs["img"].device, generator)

        def noise() -> Tensor:
            return torch.randn(inputs["img"].shape, generator=stream, device=stream.device)

        def score_times() -> Tensor:
            return self._score_times(len(inputs["img"]), size, generator)

        chosen = self._last_steps(len(inputs["img"]))
        student_turn = self._is_students_turn()
        with context.timer("forward"), torch.no_grad():
            state = self._simulate(inputs, times, chosen, noise)
        with context.timer("forward"), torch.set_grad_enabled(student_turn):
            made = self._data(context.model, inputs, state, torch.tensor([times[step] for step in chosen]))
        if student_turn:
            with context.timer("forward"):
                loss, metrics = self._student_loss(made, inputs, noise(), score_times())
            yield Turn(MODEL, loss, metrics)
        data = made.detach()
        with context.timer("forward"):
            loss = self._fake_loss(data, inputs, noise(), score_times())
        yield Turn(FAKE, loss, {"fake_loss": loss.detach(), **context.timer.take()})

    def _is_students_turn(self) -> bool:
        options = self.context.options
        step = self.context.run.states.global_step - options.fake_warmup
        return step >= 0 and step % options.fake_updates == 0

    def _last_steps(self, count: int) -> list[int]:
        """The last step of each sample of a batch, falling: every step as often as another, as far as they go into it.
        Which ones are more often is the same on all ranks, so that all make as many forward passes."""
        states, steps = self.context.run.states, len(self.positions) - 1
        common = step_generator(self.context.cfg.seed + METHOD_SEED, states.micro_step, rank=0)
        first = int(torch.randint(steps, (1,), generator=common))
        return sorted(((first + row) % steps for row in range(count)), reverse=True)

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
        options = self.context.options
        low, high = options.score_times
        alpha = options.score_shift if options.score_shift is not None else self._alpha(size)
        return time_shift(alpha, low + (high - low) * torch.rand(count, generator=generator))

    def _simulate(
        self, inputs: Mapping[str, Any], times: list[float], last: list[int], noise: Callable[[], Tensor]
    ) -> Tensor:
        """What the student has before the last step of each sample (numbers that fall), come there from noise."""
        state = noise()
        for step, (now, after) in enumerate(itertools.pairwise(times)):
            rows = sum(number > step for number in last)  # the first ones
            if rows == 0:
                break
            part = {key: value[:rows] for key, value in inputs.items() if value is not None}
            data = self._data(self.context.model, part, state[:rows], torch.full((rows,), now))
            state = torch.cat([(1 - after) * data + after * noise()[:rows], state[rows:]])
        return state

    def _data(self, model: nn.Module, inputs: Mapping[str, Any], state: Tensor, times: Tensor) -> Tensor:
        """The data that a model sees in states [B, L, C] at times [B]."""
        times = times.to(state)
        given = {**inputs, "img": state.to(inputs["img"]), "timesteps": times.to(inputs["timesteps"])}
        return state - times[:, None, None] * model(**given).float()

    def _student_loss(
        self, made: Tensor, inputs: Mapping[str, Any], noise: Tensor, times: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared distance to where the scores' difference points (arXiv:2405.14867, eq. 1)."""
        options = self.context.options
        state, wide, given = noised(made.detach(), noise, times, inputs)
        with torch.no_grad():
            real = state - wide * self.teacher.at(given, options.guidance, options.guidance_img)
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


def stream_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A stream of a device, begun by ``generator``: that one itself where it is of the device. A GPU draws noise itself
    in a hundredth of the time that a processor takes for it."""
    if device.type == generator.device.type:
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,), generator=generator)))


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
