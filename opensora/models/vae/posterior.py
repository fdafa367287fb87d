"""Diagonal Gaussian posterior of an autoencoder."""

import torch
from torch import Tensor


class DiagonalGaussian:
    """Normal distribution with a mean and a log-variance per latent element.

    Args:
        moments: ``[B, 2C, ...]``, mean and log-variance stacked on the channel axis. The log-variance is clamped to
            [-30, 20] so that its exponential stays finite.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation, same shape as ``mean``."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``mean + std * noise``; the noise is drawn on the generator's device (the mean's without one)."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over all axes but the batch: ``[B]`` (Kingma & Welling 2014)."""
        elements = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * elements.flatten(1).sum(dim=1)
