"""Losses of the video autoencoders."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.models.vae.posterior import DiagonalGaussian
from opensora.utils.errors import UserError

OBJECT_THRESHOLD = 0.1  # distance from the background colour, in [-1, 1] units, beyond which a pixel is an object's


@dataclass(frozen=True)
class VAELoss:
    """Reconstruction plus KL divergence, both as sums per frame and clip, the scale the original weights are meant for.

    ``loss = sum(w |x - y| + mse w (x - y)^2) / (B T) + kl KL / B``, with ``w = 1 + object_weight`` on pixels that
    differ from the clip's background and 1 elsewhere.

    Args:
        kl_loss_weight: weight of the KL divergence (summed over the latent, averaged over the batch).
        mse_loss_weight: weight of the squared beside the absolute error.
        object_weight: extra weight of object pixels; 0 is the plain loss.
        perceptual_loss_weight: must be 0 here.
        logvar_init: log-variance of the reconstruction; scales the reconstruction term by ``exp(-logvar_init)``.
    """

    kl_loss_weight: float = 1e-6
    mse_loss_weight: float = 0.0
    object_weight: float = 0.0
    perceptual_loss_weight: float = 0.0
    logvar_init: float = 0.0

    def __post_init__(self) -> None:
        if self.perceptual_loss_weight:
            raise UserError(
                "vae_loss_config.perceptual_loss_weight: the perceptual loss is not available in this version; set 0"
            )

    def __call__(
        self, video: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts.

        Args:
            video, reconstruction: ``[B, 3, T, H, W]``, video in [-1, 1].
            posterior: None for autoencoders without one.
        """
        difference = (video - reconstruction).float()
        error = difference.abs()
        if self.mse_loss_weight:
            error = error + self.mse_loss_weight * difference.square()
        if self.object_weight:
            error = error * (1.0 + self.object_weight * object_mask(video))
        frames = video.shape[0] * video.shape[2]
        total = error.sum() / frames * torch.exp(torch.tensor(-self.logvar_init))
        with torch.no_grad():
            # Peak signal is 2 (from -1 to 1).
            mse = difference.square().flatten(1).mean(dim=1)
            parts = {"recon": difference.abs().mean(), "psnr": (10 * torch.log10(4.0 / mse)).mean()}
        if posterior is not None:
            kl = posterior.kl().mean()
            total = total + self.kl_loss_weight * kl
            parts["kl"] = kl.detach()
        return total, parts


def object_mask(video: Tensor) -> Tensor:
    """1 where a pixel differs from the clip's background, ``[B, 1, T, H, W]``.

    The background is each clip's median colour, which holds where it covers most of the frame.
    """
    background = video.flatten(2).median(dim=2).values[:, :, None, None, None]
    return ((video - background).abs().amax(dim=1, keepdim=True) > OBJECT_THRESHOLD).to(video.dtype)
