"""The loss of the autoencoders, and what inflation keeps."""

import pytest
import torch

from opensora.config.options import VaeLossOptions
from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.vae.losses import VAELoss, object_mask
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.utils.errors import UserError


def test_vae_loss_equals_a_float64_computation():
    torch.manual_seed(0)
    video, other = torch.rand(2, 3, 5, 8, 8) * 0.05, torch.rand(2, 3, 5, 8, 8)
    video[:, :, :, 2:4, 2:4] += 0.7
    posterior = DiagonalGaussian(torch.randn(2, 8, 2, 1, 1))
    total, parts = VAELoss(VaeLossOptions(kl_loss_weight=0.1, mse_loss_weight=2.0, object_weight=3.0))(
        video, other, posterior
    )
    x, y = video.double(), other.double()
    weight = torch.ones(2, 1, 5, 8, 8, dtype=torch.float64)
    weight[:, :, :, 2:4, 2:4] += 3.0
    error = ((x - y).abs() + 2 * (x - y) ** 2) * weight
    expected = error.sum() / 10 + 0.1 * posterior.kl().double().mean()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    mse = ((x - y) ** 2).mean(dim=(1, 2, 3, 4))
    assert float(parts["psnr"]) == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), rel=1e-5)
    assert object_mask(video).sum() == 2 * 5 * 4
    with pytest.raises(UserError, match="perceptual"):
        VAELoss(VaeLossOptions(perceptual_loss_weight=0.5))


def test_inflation_keeps_single_frames_exactly():
    config = HunyuanVAEConfig(latent_channels=4, layers_per_block=1, norm_num_groups=2, block_out_channels=(4, 4, 8, 8))
    model = AutoencoderKLCausal3D(config).double()
    image = torch.randn(1, 3, 1, 16, 16, dtype=torch.float64)
    before = model(image, sample_posterior=False)[0]
    assert model.inflate_from_images()
    torch.testing.assert_close(model(image, sample_posterior=False)[0], before, atol=1e-10, rtol=1e-10)
    kernel = model.encoder.conv_in.conv.weight
    assert kernel[:, :, :-1].abs().max() == 0
