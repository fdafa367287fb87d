"""The causal VAE against diffusers' with the same random weights: whole videos and every kind of tiling."""

import pytest
import torch

from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig

SIZES = dict(latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16, 16, 32))
TILE, FRAMES = 32, 8  # tile of the tiled runs: 4 x 4 latents, 2 latent frames (and the lead)
OVERLAP = {"whole": 0.25, "spatial": 0.25, "temporal": 0.5, "both": 0.5}
HOW = list(OVERLAP)
# ways of tiling and sizes, by number: each way, and all tiles in both sizes
CASES = [("whole", 0), ("spatial", 0), ("temporal", 1), ("both", 0), ("both", 1)]
VIDEOS, LATENTS = [(17, 56, 40), (21, 48, 64)], [(5, 7, 5), (6, 6, 8)]


@pytest.fixture(scope="module")
def theirs():
    """diffusers' model; every weight is random, those of the norms too."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKLHunyuanVideo(**SIZES).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 25
            noise = torch.randn(weight.shape, generator=generator) * fan_in**-0.5
            weight.copy_(noise + 1 if weight.ndim == 1 and name.endswith("weight") else noise)
    return model


def tile(model, how):
    """Have diffusers tile as ``how`` says, with the tile and overlap of :func:`ours`."""
    stride, time_stride = int(TILE * (1 - OVERLAP[how])), int(FRAMES * (1 - OVERLAP[how]))
    model.enable_tiling(TILE, TILE, FRAMES, stride, stride, time_stride)
    model.use_tiling = how in ("spatial", "both")
    model.use_framewise_encoding = model.use_framewise_decoding = how in ("temporal", "both")


def ours(theirs, how):
    """Our model with diffusers' weights, key by key."""
    config = HunyuanVAEConfig(
        **SIZES,
        sample_size=TILE,
        sample_tsize=FRAMES,
        tile_overlap_factor=OVERLAP[how],
        use_spatial_tiling=how in ("spatial", "both"),
        use_temporal_tiling=how in ("temporal", "both"),
    )
    model = AutoencoderKLCausal3D(config).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("how", "size"), CASES)
def test_encode_equals_diffusers(theirs, how, size):
    video = draw(1, 3, *VIDEOS[size])
    tile(theirs, how)
    expected = theirs.encode(video).latent_dist
    actual = ours(theirs, how).encode_posterior(video)
    assert expected.mean.std() > 0.1
    torch.testing.assert_close(actual.mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(actual.logvar, expected.logvar, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("how", "size"), CASES)
def test_decode_equals_diffusers(theirs, how, size):
    raw = draw(1, 4, *LATENTS[size])
    tile(theirs, how)
    expected = theirs.decode(raw).sample
    model = ours(theirs, how)
    actual = model.decode(model.normalize(raw))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_tiling_changes_the_result(theirs):
    """So that the comparisons above do compare tiles."""
    video, raw = draw(1, 3, 17, 56, 40), draw(1, 4, 5, 7, 5)
    models = {how: ours(theirs, how) for how in HOW}
    coded = {how: model.encode_moments(video) for how, model in models.items()}
    decoded = {how: model.decode(raw) for how, model in models.items()}
    for how in HOW[1:]:
        assert (coded[how] - coded["whole"]).abs().max() > 1e-2
        assert (decoded[how] - decoded["whole"]).abs().max() > 1e-2


@torch.no_grad()
def test_one_frame_equals_diffusers(theirs):
    tile(theirs, "whole")
    model, image, raw = ours(theirs, "whole"), draw(2, 3, 1, 32, 24), draw(2, 4, 1, 4, 3)
    expected = theirs.encode(image).latent_dist.mean
    torch.testing.assert_close(model.encode_posterior(image).mean, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(model.normalize(raw)), theirs.decode(raw).sample, atol=1e-4, rtol=0)


def test_gradients_equal_diffusers(theirs):
    tile(theirs, "whole")
    model, video = ours(theirs, "whole"), draw(1, 3, 5, 16, 24)
    theirs.zero_grad()
    theirs.decode(theirs.encode(video).latent_dist.mode()).sample.square().mean().backward()
    model(video, sample_posterior=False)[0].square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
