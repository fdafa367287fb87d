"""Loading an MMDiT: every kind of wrong file or config has a message that names the key to change."""

import json
import subprocess
import sys

import pytest
import torch

from opensora.models.mmdit.loading import config_of_shapes, layout_metadata
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors

CONFIG = {
    "type": "flux",
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "cond_embed": True,
    "fused_qkv": False,
    "use_liger_rope": True,
    "patch_size": 2,
}
FLUX = {"guidance_embed": True, "cond_embed": False, "fused_qkv": True, "use_liger_rope": False}


def build(**overrides):
    return build_module({**CONFIG, **overrides}, MODELS)


@pytest.fixture
def write(tmp_path):
    """Writes the weights of a new model with some config fields changed; without recorded layouts by default."""

    def write(record=False, **overrides):
        torch.manual_seed(0)
        model = build(**overrides)
        path = tmp_path / "model.safetensors"
        save_safetensors(model.state_dict(), path, layout_metadata(model.config) if record else None)
        return str(path), model

    return write


@pytest.mark.parametrize("overrides", [{}, FLUX, {"depth": 0}, {"patch_size": 1}, {"qkv_bias": False}])
def test_loads_what_it_wrote(write, overrides):
    path, model = write(record=True, **overrides)
    loaded = build(from_pretrained=path, torch_dtype=torch.bfloat16, **overrides)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.bfloat16())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("file", "config", "said"),
    [
        ({}, {"fused_qkv": True}, "split QKV projections (q_proj, k_proj, v_proj): set model.fused_qkv=False"),
        ({"fused_qkv": True}, {}, "fused QKV projections (qkv, linear1): set model.fused_qkv=True"),
        ({"fused_qkv": True, "depth": 0}, {"depth": 0}, "set model.fused_qkv=True"),
        ({"hidden_size": 64, "num_heads": 4}, {}, "set model.hidden_size=64"),
        ({"in_channels": 8}, {}, "set model.in_channels=8"),
        ({"patch_size": 1}, {}, "set model.patch_size=1"),
        ({"vec_in_dim": 24}, {}, "set model.vec_in_dim=24"),
        ({"context_in_dim": 24}, {}, "set model.context_in_dim=24"),
        ({"mlp_ratio": 2.0}, {}, "set model.mlp_ratio=2.0"),
        ({"num_heads": 1, "axes_dim": [8, 12, 12]}, {}, "set model.num_heads=1"),
        ({"depth": 2}, {}, "set model.depth=2"),
        ({"depth_single_blocks": 1}, {}, "set model.depth_single_blocks=1"),
        ({"qkv_bias": False}, {}, "set model.qkv_bias=False"),
        ({"cond_embed": False}, {}, "no cond_in, so its model takes no image condition: set model.cond_embed=False"),
        ({}, {"cond_embed": False}, "has cond_in: set model.cond_embed=True"),
        ({}, {"guidance_embed": True}, "has no guidance_in: set model.guidance_embed=False"),
        (FLUX, {}, "image-only Flux model"),
        (FLUX, {**FLUX, "guidance_embed": False}, "image-only Flux model"),
        (FLUX, {}, "set model.fused_qkv=True"),
    ],
)
def test_mismatch_names_the_key(write, file, config, said):
    path, _ = write(**file)
    with pytest.raises(UserError) as error:
        build(from_pretrained=path, **config)
    assert said in str(error.value)
    assert path in str(error.value)


def test_rotary_layout_is_checked_where_recorded(write):
    path, _ = write(record=True)
    with pytest.raises(UserError, match=r"set model\.use_liger_rope=True"):
        build(from_pretrained=path, use_liger_rope=False)
    path, _ = write(record=False)
    build(from_pretrained=path, use_liger_rope=False)


def test_recorded_layout_is_not_said_twice(write):
    path, _ = write(record=True, fused_qkv=True)
    with pytest.raises(UserError) as error:
        build(from_pretrained=path)
    assert str(error.value).count("fused_qkv=") == 1


def test_other_kinds_of_files(write, tmp_path):
    path = str(tmp_path / "other.safetensors")
    save_safetensors({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="layout of diffusers"):
        build(from_pretrained=path)
    save_safetensors({"encoder.conv_in.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"not an MMDiT: check model\.from_pretrained"):
        build(from_pretrained=path)
    save_safetensors({"encoder.project_in.conv.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"\(type='dc_ae'\), not an MMDiT: .* model\.type"):
        build(from_pretrained=path)
    save_safetensors({"model.img_in.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"begin with 'model\.'"):
        build(from_pretrained=path)


def test_not_strict_starts_from_a_flux_model(write):
    path, model = write(**FLUX, record=True)
    video = {"fused_qkv": True, "use_liger_rope": False}
    started = build(from_pretrained=path, strict_load=False, **video)
    assert not started.cond_in.weight.any()
    assert torch.equal(started.img_in.weight, model.img_in.weight)
    with pytest.raises(UserError, match=r"set model\.fused_qkv=True"):  # layouts always have to match
        build(from_pretrained=path, strict_load=False)


def test_config_of_shapes(write):
    for overrides in ({}, FLUX, {"depth_single_blocks": 0}):
        _, model = write(**overrides)
        found = config_of_shapes({key: tuple(value.shape) for key, value in model.state_dict().items()})
        assert {"hidden_size", "in_channels", "num_heads", "mlp_ratio", "fused_qkv"} <= found.keys()
        assert all(getattr(model.config, key) == value for key, value in found.items())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"num_heads": 3}, "multiple of num_heads=3"),
        ({"axes_dim": [4, 6, 8]}, "axes_dim"),
        ({"axes_dim": [3, 7, 6]}, "axes_dim"),
        ({"axes_dim": 16}, "axes_dim = 16: expected list of integer"),
        ({"grad_ckpt_settings": 8}, "grad_ckpt_settings = 8: expected 2 values"),
        ({"grad_ckpt_settings": [8]}, "expected 2 values"),
        ({"grad_ckpt_settings": [-1, 8]}, "grad_ckpt_settings=.*must be at least 0"),
        ({"axes_dim": [-4, 14, 6]}, "axes_dim"),
        ({"mlp_ratio": -1}, "mlp_ratio=-1.0: must be above 0"),
        ({"theta": 0}, "theta=0.0: must be above 0"),
        ({"in_channels": 0}, "in_channels=0: must be at least 1"),
        ({"depth": -1}, "depth"),
        ({"norm_backend": "apex"}, "norm_backend"),
    ],
)
def test_config_errors(config, said):
    with pytest.raises(UserError, match=said):
        build_module({**CONFIG, **config}, MODELS, device_map="meta")


def test_missing_config_key():
    with pytest.raises(UserError, match="'flux'.theta must be given"):
        build_module({key: value for key, value in CONFIG.items() if key != "theta"}, MODELS, device_map="meta")


FULL_WIDTH = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 0,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
}
MEASURE = """
import json, sys, torch
from opensora.registry import MODELS, build_module

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

small, full = json.loads(sys.argv[1])
build_module(small, MODELS, torch_dtype=torch.bfloat16)
before = peak()
model = build_module(full, MODELS, torch_dtype=torch.bfloat16)
for parameter in model.parameters():
    parameter.detach().flatten().view(torch.int16)[::64].sum()  # reads every page
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_released_width_loads_in_the_memory_of_its_file(tmp_path):
    """About 340 MB in the released layout: one block of full width and the embedders."""
    full = {**CONFIG, **FULL_WIDTH}
    state = build_module(full, MODELS, device_map="meta").state_dict()
    path = tmp_path / "model.safetensors"
    save_safetensors({key: torch.ones(value.shape, dtype=torch.bfloat16) for key, value in state.items()}, path)
    assert path.stat().st_size > 300e6
    sections = json.dumps([CONFIG, {**full, "from_pretrained": str(path)}])
    run = subprocess.run([sys.executable, "-c", MEASURE, sections], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.2 * path.stat().st_size
