"""Memory of encoding and decoding: counted without weights, as real runs take it, and tiles that fit into it."""

import dataclasses

import pytest
import torch

from opensora.benchmark.measuring import tensor_bytes
from opensora.diffusion.decode import Dropped, decode_into
from opensora.models.build import build_on_meta
from opensora.models.dc_ae.config import DCAEConfig
from opensora.models.hunyuan_vae import HunyuanVAEConfig
from opensora.models.vae.fitting import fit_tiling, smaller
from opensora.models.vae.footprint import GROUP_NORM, LiveBytes, cost_of
from opensora.models.vae.tiling import Tiling
from opensora.registry import MODELS, build_module
from tests.unit.models.test_autoencoder_contract import SMALL

GIB = 2**30
# GiB beyond the weights on an H100 with cuDNN 9.19, torch 2.11, bf16, the released sizes
MEASURED = {(33, 24, 32): 15.3, (17, 24, 32): 7.8, (9, 16, 16): 1.4, (33, 24, 42): 20.0}


@pytest.fixture(scope="module")
def released():
    """The released autoencoder, without weights."""
    return build_on_meta(HunyuanVAEConfig(type="hunyuan_vae", use_spatial_tiling=True))


@pytest.mark.parametrize("name", SMALL)
def test_what_is_counted_without_content_is_what_a_run_takes(name):
    model = build_module({"type": name, **SMALL[name]}, MODELS, torch_dtype=torch.bfloat16).eval()
    latent = (1, model.latent_channels, 3, 4, 6)
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    counted = cost_of(model, torch.bfloat16, lambda: model.decode(torch.empty(latent, device="meta").bfloat16()))
    z = torch.zeros(latent, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes(workspace=True) as real:
        model.decode(z)
    # attention has kernels of its own on a CPU, and scores on meta; all else is the same
    assert counted.peak == pytest.approx(real.peak, rel=0.03)
    assert weights == [parameter.data_ptr() for parameter in model.parameters()]


@torch.no_grad()
def test_bytes_alive_are_those_that_the_profiler_sees():
    x = torch.randn(64, 1000)

    def run():
        y = x.relu()
        for _ in range(3):
            y = (y + 1).view(-1, 8).t().contiguous()
        return y[:2]

    with LiveBytes() as live:
        run()
    assert live.peak == pytest.approx(tensor_bytes(run), rel=0.03), "what the profiler itself makes is in there"
    assert live.peak == 3 * x.nbytes
    assert live.now == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 5), (1, 8, 3, 4, 6)])
def test_group_norm_is_counted_as_torch_gives_it(shape, dtype):
    """In the same order of memory, too: what follows copies it or not."""
    x, weight = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(8, dtype=dtype, device="meta")
    for given in (x, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        words = (given, weight, weight, shape[0], 8, given[0, 0].numel(), 4, 1e-5)
        expected = GROUP_NORM(*words)
        with LiveBytes() as live:
            found = GROUP_NORM(*words)
        assert [(a.shape, a.dtype, a.stride()) for a in found] == [(b.shape, b.dtype, b.stride()) for b in expected]
        assert live.now == live.written == sum(part.nbytes for part in expected)


@pytest.mark.parametrize("size", MEASURED)
def test_a_gpu_takes_what_is_counted(released, size):
    with released.in_tiles(dataclasses.replace(released.tiling, use_spatial=False)):
        assert released.decode_cost(size, torch.bfloat16).peak / GIB == pytest.approx(MEASURED[size], rel=0.06)


def test_encoding_is_counted_too(released):
    assert released.encode_cost((129, 192, 336), torch.bfloat16).peak / GIB == pytest.approx(10.5, rel=0.05), "measured"


@pytest.mark.parametrize("name", SMALL)
def test_a_decode_in_parts_stays_within_what_was_said(name):
    model = build_module({"type": name, **SMALL[name]}, MODELS, torch_dtype=torch.bfloat16).eval()
    z = torch.zeros(1, model.latent_channels, 4, 3, 4, dtype=torch.bfloat16)
    with torch.no_grad(), model.tiled():
        said = model.decode_cost(z.shape[2:], torch.bfloat16).peak
        with LiveBytes(workspace=True) as live:
            decode_into(Dropped(), model, z, slice(0, 1000), torch.device("cpu"), torch.bfloat16)
    assert 0.5 * said < live.peak <= 1.05 * said


def counted(model, size):
    def count(tiling):
        with model.in_tiles(tiling):
            return model.decode_cost(size, torch.bfloat16).peak

    return count


def test_the_configs_tiles_are_kept_where_they_fit_and_768px_fits_into_6_gib(released):
    size = (33, 96, 168)
    kept = fit_tiling(released.tiling, size, 24 * GIB, counted(released, size))
    assert (kept.tiling, kept.changed) == (released.tiling, False)
    fit = fit_tiling(released.tiling, size, 6 * GIB, counted(released, size))
    assert fit.changed
    assert fit.fits
    assert fit.bytes * 1.05 < 6 * GIB
    assert fit.tiling.spatial_tile == 256, "seams in time rather than more of them in space"
    hopeless = fit_tiling(released.tiling, size, GIB // 100, counted(released, size))
    assert not hopeless.fits
    assert hopeless.bytes < GIB, "the smallest is tried all the same"


def test_smaller_tiles_never_lose_frames():
    """Without a causal lead, a tile of one latent decodes to one frame."""
    tiling = build_on_meta(DCAEConfig(type="dc_ae")).tiling
    for frames in range(2, 40):
        for other in smaller(tiling, (frames, 24, 42)):
            starts = other.latent_starts(frames)
            assert not other.cuts_time(frames) or frames - starts[-1] > 1


def test_work_counts_what_tiles_cover_twice():
    tiling = Tiling((4, 8, 8), True, 32, 16, 0.25, use_spatial=True, use_temporal=True)
    assert tiling.work((4, 4, 4)) == 1
    assert tiling.work((4, 3, 7)) == pytest.approx(9 / 7), "tiles of 4, 4 and 1 columns"
    assert tiling.work((5, 4, 4)) == pytest.approx(7 / 5), "of 5 and 2 frames, the lead counted"
    assert tiling.largest((9, 9, 3)) == (5, 4, 3)
    assert tiling.describe() == "tiles of 32 px and 16 frames"


def test_what_cannot_be_counted_is_not_known():
    model = build_module({"type": "hunyuan_vae", **SMALL["hunyuan_vae"]}, MODELS).eval()
    assert cost_of(model, torch.float32, lambda: torch.zeros(1, device="meta").cpu()) is None, "there are no values"
    fit = fit_tiling(model.tiling, (3, 4, 4), 1, lambda tiling: None)
    assert (fit.tiling, fit.bytes, fit.fits) == (model.tiling, None, True)
