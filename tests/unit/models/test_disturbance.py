"""Noise between encoder and decoder: how strong, from which stream, and where it goes."""

import pytest
import torch

from opensora.models.vae.disturbance import disturbed
from opensora.registry import MODELS, build_module
from tests.helpers import vae_runs


def test_strength_is_drawn_for_each_sample_up_to_the_most():
    z = torch.zeros(400, 4, 2, 8, 8, dtype=torch.float64)
    noise = disturbed(z, 0.6, torch.Generator().manual_seed(0))
    strength = noise.std(dim=(1, 2, 3, 4))
    assert strength.max() < 0.66
    assert strength.min() < 0.02
    # Evenly from 0 to 0.6: the mean of 400 has a standard error of 0.6 / sqrt(12 * 400) = 0.009.
    assert strength.mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(noise, disturbed(z, 0.6, torch.Generator().manual_seed(0)))
    assert disturbed(z, 0.0) is z
    assert disturbed(z.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", sorted(vae_runs.MODELS))
def test_the_decoder_sees_it_and_the_latents_do_not(kind):
    torch.manual_seed(0)
    model = build_module(dict(vae_runs.MODELS[kind]), MODELS).eval()
    frames = 5 if kind == "hunyuan_vae" else 4
    video = torch.rand(1, 3, frames, 32, 32) * 2 - 1

    def run(**how):
        return model(video, sample_posterior=False, generator=torch.Generator().manual_seed(1), **how)

    plain, noisy = run(), run(latent_noise=1.0)
    assert torch.equal(plain[2], noisy[2])
    again = disturbed(plain[2], 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(noisy[0], model.decode(again).to(video.dtype))
    assert not torch.equal(plain[0], noisy[0])
