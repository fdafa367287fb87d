"""Tiled encoding and decoding: against the reference tensors, and the arithmetic by itself."""

import pytest
import torch
import torch.nn.functional as F

from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.vae.tiling import HEIGHT, TIME, Tiling
from opensora.utils.errors import UserError


@torch.no_grad()
@pytest.mark.parametrize("which", ["spatial", "temporal", "both"])
def test_tiled_causal_vae_equals_the_original(golden, which):
    data = golden(f"hunyuan_vae_tiled_{which}")
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(**data.meta["config"])).eval()
    model.load_state_dict(golden("hunyuan_vae").weights, strict=True)
    z = model.encode(data.inputs["video"], sample_posterior=False)
    torch.testing.assert_close(z, data.outputs["z_mode_tiled"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(data.inputs["z"]), data.outputs["decoded_tiled"], atol=1e-4, rtol=1e-4)


def both(is_causal, overlap=0.25, spatial=32, temporal=16):
    return Tiling((4, 8, 8), is_causal, spatial, temporal, overlap, use_spatial=True, use_temporal=True)


def average(x, is_causal):
    """A network without borders: means over 4x8x8 pixels, the first frame apart if causal."""
    if not is_causal:
        return F.avg_pool3d(x, (4, 8, 8))
    first = F.avg_pool3d(x[:, :, :1], (1, 8, 8))
    return torch.cat([first, F.avg_pool3d(x[:, :, 1:], (4, 8, 8))], 2) if x.shape[2] > 1 else first


def repeat(z, is_causal):
    """The pixels that ``average`` would take back to ``z``."""
    z = z.repeat_interleave(8, 3).repeat_interleave(8, 4).repeat_interleave(4, 2)
    return z[:, :, 3:] if is_causal else z


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [3, 4, 5, 6, 7, 10])
@pytest.mark.parametrize(("height", "width"), [(32, 40), (88, 24), (64, 104)])
def test_a_network_without_borders_is_not_changed(is_causal, groups, height, width):
    # Overlapping tiles agree, so fading is the identity and any misplaced row, column or frame shows.
    x = torch.randn(2, 1, 4 * groups + is_causal, height, width, dtype=torch.float64)
    plain = average(x, is_causal)
    for overlap in (0.0, 0.25, 0.3, 0.5):  # 0.3 is no whole number of latents
        tiling = both(is_causal, overlap)
        tiled = tiling.encode(x, lambda tile: average(tile, is_causal))
        torch.testing.assert_close(tiled, plain, atol=1e-12, rtol=0)
        decoded = tiling.decode(plain, lambda tile: repeat(tile, is_causal))
        torch.testing.assert_close(decoded, repeat(plain, is_causal), atol=1e-12, rtol=0)


def test_no_tile_is_larger_than_asked_for():
    sizes = []
    both(True).encode(torch.zeros(1, 1, 49, 72, 72), lambda x: sizes.append(x.shape[2:]) or average(x, True))
    assert max(t for t, _, _ in sizes) == 17  # one frame more than the tile, the lead
    assert min(t for t, _, _ in sizes) == 13  # 0-16, 12-28, 24-40, 36-48; a tile of frame 48 alone adds nothing
    assert {max(h, w) for _, h, w in sizes} <= {24, 32}


def test_small_input_is_run_whole():
    x = torch.zeros(1, 1, 16, 32, 32)
    calls = []
    both(False).encode(x, lambda tile: calls.append(tile) or tile)
    assert len(calls) == 1
    assert calls[0] is x


def test_fading_is_linear_and_in_the_tiles_dtype():
    tiling = both(False, overlap=0.5)
    axis = tiling._axis(HEIGHT, decoding=True)
    assert (axis.size, axis.stride, axis.extent, axis.keep) == (4, 2, 16, 16)
    faded = axis.join(torch.zeros(1, 1, 1, 32, 1), torch.ones(1, 1, 1, 32, 1), HEIGHT)
    torch.testing.assert_close(faded.flatten(), torch.cat([torch.arange(16) / 16, torch.ones(16)]))
    short = axis.join(torch.zeros(1, 1, 1, 32, 1), torch.ones(1, 1, 1, 8, 1), HEIGHT)
    torch.testing.assert_close(short.flatten(), torch.arange(8) / 8)  # a short last tile fades over its length
    half = axis.join(torch.zeros(1, 1, 1, 32, 1).bfloat16(), torch.ones(1, 1, 1, 32, 1).bfloat16(), HEIGHT)
    assert half.dtype == torch.bfloat16


def test_gradients_pass_through_tiles():
    x = torch.randn(1, 1, 24, 40, 40, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(1, 1, 6, 5, 5, dtype=torch.float64)
    tiled = both(False).encode(x, lambda tile: average(tile, False))
    expected = torch.autograd.grad(average(x, False), x, probe)[0]
    torch.testing.assert_close(torch.autograd.grad(tiled, x, probe)[0], expected, atol=1e-12, rtol=0)


def test_latent_tiles_follow_the_pixels_and_bad_sizes_are_named():
    assert both(False, spatial=96, temporal=20).latent_tile(HEIGHT) == 12
    assert both(False, spatial=96, temporal=20).latent_tile(TIME) == 5
    with pytest.raises(UserError, match="spatial tiles of 100 must be a multiple of 8; nearest: 96"):
        both(False, spatial=100)
    with pytest.raises(UserError, match="temporal tiles of 3 must be a multiple of 4; nearest: 4"):
        both(False, temporal=3)
    with pytest.raises(UserError, match="tile_overlap_factor=1"):
        HunyuanVAEConfig(tile_overlap_factor=1.0)
