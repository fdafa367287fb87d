"""Tiles within a budget, models that leave the card, quantised weights: against the plain path, within the memory."""

from dataclasses import replace

import pytest
import torch

from opensora.config import load_config
from opensora.config.choices import QUANTIZERS
from opensora.config.commands import InferenceOptions
from opensora.diffusion.decode import Gathered, decode_into, room_to_work
from opensora.diffusion.offload import on_device
from opensora.diffusion.pipeline import VideoPipeline
from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.mmdit.loading import quantization
from opensora.utils.errors import UserError
from tools.benchmark.gpu_parts.bench import TOY, filled
from tools.benchmark.released import released_inputs, released_model

GIB = 2**30


def small_vae(device, dtype, **keys):
    torch.manual_seed(0)
    config = HunyuanVAEConfig(block_out_channels=[32] * 4, layers_per_block=1, **keys)
    return filled(lambda: AutoencoderKLCausal3D(config), device, dtype)


@pytest.mark.anywhere
@torch.no_grad()
def test_a_decode_takes_what_is_foretold(device):
    vae = small_vae(device, torch.bfloat16)
    z = torch.randn(1, 16, 5, 8, 8, device=device, dtype=torch.bfloat16)
    cost = vae.decode_cost(z.shape[2:], z.dtype)
    if device.type == "cpu":
        assert cost.peak > 0
        return
    vae.decode(z)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vae.decode(z)
    assert (torch.cuda.max_memory_allocated() - before) < 1.3 * cost.peak + 64 * 2**20


@pytest.mark.anywhere
def test_tiles_of_a_budget_give_nearly_the_same_pixels(device):
    """Seams are where tiles differ: pixels do so by a few levels in the mean. In parts, they do not differ at all."""
    vae = small_vae(device, torch.float32, use_spatial_tiling=True, sample_size=64, sample_tsize=16)
    z = torch.randn(1, 16, 6, 8, 9, device=device)
    whole, parts, small = Gathered(), Gathered(), Gathered()
    kept, dtype = slice(0, 1000), torch.float32
    assert decode_into(whole, vae, z, kept, device, dtype) == ""
    assert decode_into(parts, vae, z, kept, device, dtype, 2**40) == ""
    cost = vae.decode_cost(z.shape[2:], dtype)
    told = decode_into(small, vae, z, kept, device, dtype, int(cost.peak / 2))
    assert "tiles of" in told
    assert (whole.videos()[0] == parts.videos()[0]).all()
    assert whole.videos()[0].shape == small.videos()[0].shape


def test_a_capped_gpu_decodes_in_smaller_tiles(device):
    vae = small_vae(device, torch.bfloat16, use_spatial_tiling=True)
    z = torch.randn(1, 16, 17, 32, 32, device=device, dtype=torch.bfloat16)
    cost, total = vae.decode_cost(z.shape[2:], z.dtype), torch.cuda.mem_get_info()[1]
    limit = torch.cuda.memory_allocated() + int(cost.peak / 2)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min((limit + 2**28) / total, 1.0))
    try:
        room = room_to_work(device, limit)
        assert room is not None
        assert room <= cost.peak / 2 + 2**20
        assert decode_into(Gathered(), vae, z, slice(0, 65), device, z.dtype, room)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.anywhere
@torch.no_grad()
def test_offload_is_exact_and_leaves_nothing(device):
    sizes = replace(TOY["256px"], dtype=torch.float32)
    torch.manual_seed(0)
    model = released_model(sizes, device).eval()
    inputs = released_inputs(model, sizes, device)
    expected = model(**inputs)
    home = model.to("cpu")
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with on_device(home, device, offload=True) as moved:
        assert torch.equal(moved(**inputs), expected)
    assert next(home.parameters()).device.type == "cpu"
    if device.type == "cuda":
        assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.anywhere
@torch.no_grad()
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantised_weights_are_near(device, kind):
    sizes = replace(TOY["256px"], dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = released_model(sizes, device).eval().requires_grad_(False)
    inputs = released_inputs(model, sizes, device)
    expected = model(**inputs).float()
    try:
        quantization(kind).replace_filled(model)
        found = model(**inputs).float()
    except UserError as error:
        pytest.skip(str(error))
    # 3 bits of mantissa (fp8), 7 (int8), 4-bit levels (nf4)
    assert (found - expected).norm() < {"fp8": 0.1, "int8": 0.05, "nf4": 0.2}.get(kind, 0.2) * expected.norm()


@pytest.mark.anywhere
@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("offload", [False, True, "blocks"])
def test_pipelines_agree(device, saved_config, offload, precompute):
    """Wherever the weights are meanwhile, and whatever is computed once: bit for bit the same latents."""
    plain = {**saved_config, "device": device.type, "precompute": False}
    try:
        cfg = load_config(plain, InferenceOptions, {"offload": offload, "precompute": precompute})
    except UserError as error:
        pytest.skip(str(error))
    expected = VideoPipeline.from_config(load_config(plain, InferenceOptions), device)("a", seed=1)
    found = VideoPipeline.from_config(cfg, device)("a", seed=1)
    torch.testing.assert_close(found.latents, expected.latents, atol=1e-5 if precompute else 0, rtol=0)
