"""Losses of the video autoencoders: reconstruction, perceptual, KL, and the adversarial ones of both sides."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.config.options import VaeLossOptions
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.utils.errors import UserError

OBJECT_THRESHOLD = 0.1  # distance from the background colour, in [-1, 1] units, beyond which a pixel is an object's
DISCRIMINATOR_LOSSES = ("hinge", "vanilla", "wgan-gp")
PENALTY_WEIGHT = 10.0  # of the gradient penalty (arXiv:1704.00028)
MAX_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True)
class LossTerms:
    """Parts of the autoencoder's loss.

    Args:
        nll: reconstruction and perceptual term, the negative log-likelihood up to a constant; scalar.
        kl: weighted KL divergence, scalar.
        parts: numbers to log.
    """

    nll: Tensor
    kl: Tensor
    parts: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """What the autoencoder minimises without a discriminator."""
        return self.nll + self.kl


@dataclass(frozen=True)
class VAELoss:
    """Reconstruction plus KL divergence, both as sums per frame and clip, the scale the original weights are meant for.

    ``loss = sum(w |x - y| + mse w (x - y)^2 + p LPIPS) / (B T) + kl KL / B``, with ``w = 1 + object_weight`` on pixels
    that differ from the clip's background and 1 elsewhere; the LPIPS of a frame counts for each of its values.

    The KL divergence is summed over the latent and averaged over the batch; ``logvar_init`` scales the first sum by
    ``exp(-logvar_init)``.

    Args:
        options: the weights.
        perceptual: LPIPS with its weights, ``([N, 3, H, W], [N, 3, H, W]) -> [N]``.

    Raises:
        UserError: a perceptual weight without ``perceptual``.
    """

    options: VaeLossOptions = field(default_factory=VaeLossOptions)
    perceptual: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.options.perceptual_loss_weight and self.perceptual is None:
            raise UserError(
                "vae_loss_config.perceptual_loss_weight: the perceptual loss needs LPIPS; give its weights or set 0"
            )

    def __call__(
        self, video: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts; arguments as in `terms`."""
        terms = self.terms(video, reconstruction, posterior)
        return terms.total, terms.parts

    def terms(self, video: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian | None) -> LossTerms:
        """The loss in its parts.

        Args:
            video, reconstruction: ``[B, 3, T, H, W]``, video in [-1, 1].
            posterior: None for autoencoders without one.
        """
        difference = (video - reconstruction).float()
        error = difference.abs()
        if self.options.mse_loss_weight:
            error = error + self.options.mse_loss_weight * difference.square()
        if self.options.object_weight:
            error = error * (1.0 + self.options.object_weight * object_mask(video))
        frames = video.shape[0] * video.shape[2]
        total = error.sum() / frames
        with torch.no_grad():
            # Peak signal is 2 (from -1 to 1).
            mse = difference.square().flatten(1).mean(dim=1)
            parts = {"recon": difference.abs().mean(), "psnr": (10 * torch.log10(4.0 / mse)).mean()}
        if self.perceptual is not None and self.options.perceptual_loss_weight:
            distance = self.perceptual(_frames(video), _frames(reconstruction)).mean()
            total = total + self.options.perceptual_loss_weight * distance * (error.numel() / frames)
            parts["perceptual"] = distance.detach()
        nll = (
            total * torch.exp(torch.tensor(-self.options.logvar_init))
            + self.options.logvar_init * error.numel() / frames
        )
        kl = nll.new_zeros(())
        if posterior is not None:
            divergence = posterior.kl().mean()
            kl = self.options.kl_loss_weight * divergence
            parts["kl"] = divergence.detach()
        return LossTerms(nll, kl, parts)


def _frames(video: Tensor) -> Tensor:
    """``[B, 3, T, H, W]`` to float32 images ``[B T, 3, H, W]``."""
    return video.float().transpose(1, 2).flatten(0, 1)


def object_mask(video: Tensor) -> Tensor:
    """1 where a pixel differs from the clip's background, ``[B, 1, T, H, W]``.

    The background is each clip's median colour, which holds where it covers most of the frame.
    """
    background = video.flatten(2).median(dim=2).values[:, :, None, None, None]
    return ((video - background).abs().amax(dim=1, keepdim=True) > OBJECT_THRESHOLD).to(video.dtype)


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How strongly the adversarial loss must count to pull the last layer as hard as the reconstruction does.

    ``|d nll / d last| / (|d adversarial / d last| + 1e-4)``, at most 1e4 (VQGAN, arXiv:2012.09841, equation 7).

    Args:
        nll, adversarial: scalars whose graphs are kept.
        last_layer: weight of the autoencoder's last convolution.

    Returns:
        A scalar without gradient.
    """
    nll_gradient = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].float()
    adversarial_gradient = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].float()
    weight = nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return weight.clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator, a scalar.

    Args:
        kind: "hinge" (arXiv:1705.02894), "vanilla" (arXiv:1406.2661, as cross entropy with logits) or "wgan-gp"
            (arXiv:1704.00028, without its `gradient_penalty`).
        real, fake: scores of clips and of reconstructions, any shape.

    Raises:
        UserError: another kind.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if kind == "wgan-gp":
        return fake.mean() - real.mean()
    raise UserError(f"disc_loss_config.disc_loss_type={kind!r} is unknown; use {', '.join(DISCRIMINATOR_LOSSES)}")


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """``10 (|d D(x) / d x| - 1)^2`` at points between real and fake clips, a scalar (arXiv:1704.00028, section 4).

    Args:
        discriminator: clips to scores.
        real, fake: ``[B, 3, T, H, W]``.
        generator: draws the points.
    """
    share = torch.rand(real.shape[0], generator=generator).to(real.device, real.dtype).reshape(-1, 1, 1, 1, 1)
    points = (share * real + (1 - share) * fake).detach().requires_grad_()
    gradient = torch.autograd.grad(discriminator(points).float().sum(), points, create_graph=True)[0]
    return PENALTY_WEIGHT * (gradient.float().flatten(1).norm(dim=1) - 1.0).square().mean()
