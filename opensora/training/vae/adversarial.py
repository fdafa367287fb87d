"""Training an autoencoder against a discriminator: the losses of both sides."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opensora.config.options import DiscriminatorLossOptions, GeneratorLossOptions
from opensora.models.vae.losses import adaptive_weight, discriminator_loss, gradient_penalty
from opensora.training.roles import Role

DISCRIMINATOR, DISC = "discriminator", "disc"  # the role's name, and how its metrics and further files begin
Losses = tuple[Tensor | None, dict[str, Tensor]]  # what to minimise, None for nothing yet, and numbers to log


@dataclass(frozen=True)
class AdversarialOptions:
    """Weights and beginnings of the two adversarial losses.

    Attributes:
        generator: the autoencoder's.
        discriminator: the discriminator's.
    """

    generator: GeneratorLossOptions = field(default_factory=GeneratorLossOptions)
    discriminator: DiscriminatorLossOptions = field(default_factory=DiscriminatorLossOptions)


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
    """The losses of both sides.

    Args:
        role: the discriminator in training.
        options: weights and beginnings.
    """

    def __init__(self, role: Role, options: AdversarialOptions) -> None:
        self.engine, self.options = role.engine, options

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
        options = self.options.generator
        if step < options.gen_start:
            return None, {}
        discriminator = self.engine.unwrap()
        with without_gradients(discriminator):
            adversarial = -discriminator(reconstruction).float().mean()
        weight = adaptive_weight(nll, adversarial, last_layer) * options.disc_weight
        numbers = {"gen_loss": adversarial.detach(), "gen_weight": weight}
        return weight * options.disc_factor * adversarial, numbers

    def discriminator_loss(self, real: Tensor, fake: Tensor, step: int, generator: torch.Generator) -> Losses:
        """What the discriminator minimises, and numbers to log; None before ``disc_start``.

        Args:
            real, fake: clips and reconstructions, without graph.
            step: optimizer steps done.
            generator: draws what the gradient penalty needs.
        """
        options = self.options.discriminator
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
