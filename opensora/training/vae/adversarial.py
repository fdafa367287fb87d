"""Training an autoencoder against a discriminator: the losses of both sides, and both optimizers behind one engine."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.engine import Engine
from opensora.models.vae.losses import DISCRIMINATOR_LOSSES, adaptive_weight, discriminator_loss, gradient_penalty
from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.loop import TrainLoop
from opensora.training.report.metrics import MetricLog
from opensora.training.weights.masters import MasterWeights
from opensora.training.weights.optimizer import Schedule
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

Losses = tuple[Tensor | None, dict[str, Tensor]]  # what to minimise, None for nothing yet, and numbers to log


@dataclass(frozen=True)
class AdversarialOptions:
    """Weights and beginnings of the two adversarial losses.

    Args:
        gen_start: optimizer step at which the autoencoder's begins.
        gen_factor: constant factor of the autoencoder's.
        disc_weight: weight of the autoencoder's, on top of the adaptive one.
        disc_start: optimizer step at which the discriminator's begins.
        disc_factor: constant factor of the discriminator's.
        disc_loss_type: "hinge", "vanilla" or "wgan-gp".

    Raises:
        UserError: unknown form of the loss.
    """

    gen_start: int = 0
    gen_factor: float = 1.0
    disc_weight: float = 0.5
    disc_start: int = 0
    disc_factor: float = 1.0
    disc_loss_type: str = "hinge"

    def __post_init__(self) -> None:
        if self.disc_loss_type not in DISCRIMINATOR_LOSSES:
            raise UserError(
                f"disc_loss_config.disc_loss_type={self.disc_loss_type!r}: use {', '.join(DISCRIMINATOR_LOSSES)}"
            )

    @classmethod
    def from_config(
        cls, generator: Mapping[str, Any] | None, discriminator: Mapping[str, Any] | None
    ) -> "AdversarialOptions":
        """From the sections ``gen_loss_config`` and ``disc_loss_config``."""
        own = dict(generator or {})
        factor = own.pop("disc_factor", 1.0)  # both sections call their factor so
        return cls(gen_factor=factor, **own, **(discriminator or {}))


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Within it, the module's weights take no part in the graph; what passes through it does."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Adversary:
    """The discriminator with its optimizer and schedule, and the losses of both sides.

    Args:
        engine: discriminator and optimizer.
        schedule: its learning rate per optimizer step.
        options: weights and beginnings.
        masters: fp32 copies of its weights, if it computes in another dtype and the engine keeps none.
    """

    def __init__(
        self, engine: Engine, schedule: Schedule, options: AdversarialOptions, masters: MasterWeights | None = None
    ) -> None:
        self.engine, self.schedule, self.options, self.masters = engine, schedule, options, masters

    def saved(self) -> dict[str, Mapping[str, Tensor]]:
        """Whole weights for a checkpoint, and fp32 ones beside them where there are such; every rank calls it."""
        gather = self.engine.gather
        parts: dict[str, Mapping[str, Tensor]] = {"discriminator": gather(self.engine.unwrap().state_dict())}
        masters = self.engine.master_state() if self.masters is None else gather(self.masters.state_dict())
        return {**parts, "disc_master": masters} if masters else parts

    def generator_loss(self, nll: Tensor, reconstruction: Tensor, last_layer: Tensor, step: int) -> Losses:
        """What the autoencoder adds to its loss, and numbers to log.

        Args:
            nll: its reconstruction loss, for the adaptive weight.
            reconstruction: ``[B, 3, T, H, W]``.
            last_layer: weight of its last convolution.
            step: optimizer steps done.

        Returns:
            ``-mean D(x)`` times adaptive and constant weights, None before ``gen_start``.
        """
        options = self.options
        if step < options.gen_start:
            return None, {}
        discriminator = self.engine.unwrap()
        with without_gradients(discriminator):
            adversarial = -discriminator(reconstruction).float().mean()
        weight = adaptive_weight(nll, adversarial, last_layer) * options.disc_weight
        numbers = {"gen_loss": adversarial.detach(), "gen_weight": weight}
        return weight * options.gen_factor * adversarial, numbers

    def discriminator_loss(self, real: Tensor, fake: Tensor, step: int, generator: torch.Generator) -> Losses:
        """What the discriminator minimises, and numbers to log; None before ``disc_start``.

        Args:
            real, fake: clips and reconstructions, without graph.
            step: optimizer steps done.
            generator: draws what the gradient penalty needs.
        """
        options = self.options
        if step < options.disc_start:
            return None, {}
        model = self.engine.unwrap()
        # Through the wrapper once: data-parallel ones may copy buffers before a forward, which the backward of an
        # earlier one does not survive. Gradients are exchanged either way.
        real_scores, fake_scores = self.engine.model(real), model(fake)
        loss = discriminator_loss(options.disc_loss_type, real_scores, fake_scores)
        if options.disc_loss_type == "wgan-gp":
            loss = loss + gradient_penalty(model, real, fake, generator)
        loss = options.disc_factor * loss
        numbers = {"disc_loss": loss, "logits_real": real_scores.mean(), "logits_fake": fake_scores.mean()}
        return loss, {name: value.detach() for name, value in numbers.items()}


class AdversarialEngine:
    """Autoencoder and discriminator behind the interface of one engine.

    The discriminator's forward and backward come after the autoencoder's backward, when its graph is gone. Both step
    together; gradients of each are clipped on their own.

    Args:
        model: the autoencoder.
        generator: its engine, None if all of it is frozen.
        adversary: the discriminator.
        accumulation: micro-batches per optimizer step.
        log: takes the discriminator's numbers.
    """

    def __init__(
        self, model: nn.Module, generator: Engine | None, adversary: Adversary, accumulation: int, log: MetricLog
    ) -> None:
        self.model, self.generator, self.adversary = model, generator, adversary
        self.accumulation, self.log = accumulation, log
        self.optimizer = (generator or adversary.engine).optimizer
        self.rounded_to = None if generator is None else generator.rounded_to
        self.ranks = adversary.engine.ranks
        self._later: Callable[[], Losses] | None = None

    @property
    def _engines(self) -> list[Engine]:
        return [engine for engine in (self.generator, self.adversary.engine) if engine is not None]

    def then(self, loss: Callable[[], Losses]) -> None:
        """Set the discriminator's loss of this micro-batch, computed after the autoencoder's backward."""
        self._later = loss

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of both sides for one micro-batch."""
        if self.generator is not None:
            self.generator.backward(loss)
        del loss
        later, self._later = self._later, None
        if later is None:
            return
        own, numbers = later()
        if own is not None:
            self.adversary.engine.backward(own / self.accumulation)
            self.log.add(numbers)

    def no_sync(self) -> AbstractContextManager:
        stack = ExitStack()
        for engine in self._engines:
            stack.enter_context(engine.no_sync())
        return stack

    def step(self) -> float:
        """Update both; returns the gradient norm of the autoencoder, or of the discriminator if it trains alone."""
        norm = None if self.generator is None else self.generator.step()
        discriminator_norm = self.adversary.engine.step()
        if not math.isfinite(discriminator_norm):
            logger.warning("the discriminator's gradient is not finite: its weights are left as they are")
        if norm is None:  # then the loop itself keeps the discriminator's schedule
            return discriminator_norm
        self.adversary.schedule.step()
        if math.isfinite(discriminator_norm):
            self.log.add({"disc_grad_norm": discriminator_norm})
        return norm

    def unwrap(self) -> nn.Module:
        """The plain autoencoder."""
        return self.model if self.generator is None else self.generator.unwrap()

    def gather(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return state if self.generator is None else self.generator.gather(state)

    def scatter(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state) if self.generator is None else self.generator.scatter(state)

    def master_state(self) -> Mapping[str, Tensor]:
        return {} if self.generator is None else self.generator.master_state()

    def load_master_state(self, state: Mapping[str, Tensor]) -> None:
        if self.generator is not None:
            self.generator.load_master_state(state)

    def on_any_rank(self, flag: bool) -> bool:
        return self._engines[0].on_any_rank(flag)

    def state_dict(self) -> Mapping[str, Any]:
        """State of the autoencoder's optimizer; empty if it is frozen."""
        return {} if self.generator is None else self.generator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        if self.generator is not None:
            self.generator.load_state_dict(state)


class AdversarialLoop(TrainLoop):
    """The training loop on an `AdversarialEngine`: checkpoints also hold the discriminator and its optimizer."""

    def content(self) -> CheckpointContent:
        """See :class:`TrainLoop`; adds ``discriminator`` and ``disc_optimizer`` (schedules follow from the step)."""
        assert isinstance(self.engine, AdversarialEngine)
        content, adversary = super().content(), self.engine.adversary
        return replace(
            content,
            extra_models={**(content.extra_models or {}), **adversary.saved()},
            optimizers={**content.optimizers, "disc_optimizer": adversary.engine.state_dict()},
        )
