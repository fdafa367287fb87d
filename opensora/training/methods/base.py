"""What a training method is. The trainer moves batches, engines, logs and checkpoints; a method says what to minimise.

A method of a user's own::

    @METHODS.register("x0_weighted")                    # opensora.config.choices
    class X0Weighted(TrainingMethod):
        def __call__(self, batch, generator):
            ...
            yield Turn(MODEL, loss, {})

is chosen with ``imports = ["my_package"]`` and ``training_method = "x0_weighted"``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from opensora.config.commands import TrainOptions
from opensora.config.options import OptimOptions, Options, SchedulerOptions, check_group
from opensora.models.diffusion import DiffusionModel
from opensora.training.diffusion.inputs import InputEncoder
from opensora.training.report.metrics import StageTimer
from opensora.training.roles import Role, Turn
from opensora.training.run import Run
from opensora.training.weights.optimizer import Schedule
from opensora.training.weights.schedules import schedule_options

METHOD_SEED = 104_729  # beside the run's seed, so that what a method builds does not change the model's start


@dataclass(frozen=True)
class MethodContext:
    """What a method works with.

    Attributes:
        cfg: resolved config.
        options: the method's own, from ``training_method_config``.
        run: device, dtype, processes, checkpoint to resume and place in the run (``run.states``).
        model: the model as a forward pass calls it.
        plain: the same without an engine's wrapper.
        encode: makes the model's inputs from batches.
        timer: takes the time of stages (``record_time``).
        total_steps: optimizer step that the run ends at.
    """

    cfg: TrainOptions
    options: Any
    run: Run
    model: nn.Module
    plain: DiffusionModel
    encode: InputEncoder
    timer: StageTimer
    total_steps: int

    def role(self, name: str, module: nn.Module, optim: OptimOptions, schedule: SchedulerOptions | None = None) -> Role:
        """Train a module of the method's own; checkpoints save and resume it, its optimizer and its fp32 weights.

        Args:
            name: not ``model``; in turns, in checkpoints (``NAME/model.safetensors``) and in ``NAME_grad_norm``.
            module: the same on every rank; built in ``run.master_dtype``.
            optim: its optimizer.
            schedule: its learning rates; those of the config, if not given.
        """
        options, start = schedule or schedule_options(self.cfg), self.run.states.global_step
        make: partial[Schedule] = partial(
            self.run.schedule, options=options, total=self.total_steps, start=start, optim=optim
        )
        return self.run.role(name, module.to(self.run.device), optim, make)


class TrainingMethod(ABC):
    """What a batch of clips and captions is minimised for, and what trains besides the model.

    Attributes:
        options: option group of ``training_method_config``.
        adds_adapters: whether, with ``lora_config``, it puts adapters of its own into the model.
        weighs: whether ``time_sampling`` and ``loss_weighting`` apply; otherwise a config that sets them is refused.
        roles: what trains besides the model, made in ``__init__`` with :meth:`MethodContext.role`. Further frozen
            models, such as a teacher, are built there too (``context.run.build(section)``).
    """

    options: ClassVar[type[Options]] = Options
    adds_adapters: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_group(cls.options, Options, f"the training method {cls.__name__}")

    def __init__(self, context: MethodContext) -> None:
        self.context = context
        self.roles: list[Role] = []

    @classmethod  # noqa: B027 - most find nothing
    def check(cls, cfg: TrainOptions, options: Any, model: nn.Module) -> None:
        """Find what is wrong before any weights are loaded.

        Args:
            cfg: resolved config.
            options: of :attr:`options`.
            model: on the meta device; must be left as it is.

        Raises:
            UserError: names the key and what would be right.
        """

    def metadata(self) -> dict[str, str]:
        """What weight files are to say of the model besides its layout, such as how it is to be sampled."""
        return {}

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> Iterator[Turn]:
        """See :class:`opensora.training.loop.Losses`."""
