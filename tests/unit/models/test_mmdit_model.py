"""The MMDiT as a module: full-size layouts, its inputs, its initial state, and what it needs to be imported."""

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from opensora.models.mmdit import MMDiTModel
from opensora.models.mmdit.attention import JointAttention
from opensora.registry import MODELS, build_module

RELEASED = {
    "type": "flux",
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "cond_embed": True,
    "fused_qkv": False,
    "use_liger_rope": True,
}
TINY = RELEASED | {
    "in_channels": 8,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
}
FLUX = {"guidance_embed": True, "cond_embed": False, "fused_qkv": True, "use_liger_rope": False}


@pytest.mark.parametrize(
    ("overrides", "tensors", "parameters", "digest"),
    [
        ({}, 1082, 11_891_390_528, "53fc334cbd490515"),
        ({"in_channels": 128, "patch_size": 1}, 1082, 11_891_971_200, "8677b6e74011bbf4"),
        ({"cond_embed": False}, 1080, 11_891_178_560, "c25256a66d62875d"),
        (FLUX, 780, 11_901_408_320, "2377477411f90031"),
    ],
)
def test_full_size_keys_and_shapes(overrides, tensors, parameters, digest):
    """The digest freezes every key and shape, in order, as read from lists of the released files."""
    model = build_module({**RELEASED, **overrides}, MODELS, device_map="meta", torch_dtype=torch.bfloat16)
    state = model.state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters
    text = "".join(f"{key}\t{tuple(value.shape)}\n" for key, value in state.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def example(batch=2, **overrides):
    """A tiny model in training mode, with inputs."""
    torch.manual_seed(0)
    model = build_module({**TINY, **overrides}, MODELS)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).expand(batch, -1, -1)
    inputs = {
        "img": torch.randn(batch, 12, 8),
        "img_ids": grid,
        "txt": torch.randn(batch, 5, 20),
        "txt_ids": torch.zeros(batch, 5, 3),
        "timesteps": torch.rand(batch),
        "y_vec": torch.randn(batch, 12),
    }
    if model.config.cond_embed:
        inputs["cond"] = torch.randn(batch, 12, 8 + model.config.patch_size**2)
    if model.config.guidance_embed:
        inputs["guidance"] = torch.full((batch,), 4.0)
    return model, inputs


@pytest.mark.parametrize("overrides", [{}, FLUX, {"depth": 0}, {"depth_single_blocks": 0}, {"patch_size": 1}])
def test_shapes_and_independent_samples(overrides):
    model, inputs = example(**overrides)
    out = model(**inputs)
    assert out.shape == inputs["img"].shape
    alone = model(**{key: value[1:] for key, value in inputs.items()})
    torch.testing.assert_close(out[1:], alone, rtol=1e-4, atol=1e-5)


def test_condition_starts_without_effect():
    model, inputs = example()
    without = model(**{**inputs, "cond": torch.zeros_like(inputs["cond"])})
    assert torch.equal(model(**inputs), without)
    assert model.final_layer.linear.weight.any()  # all else keeps torch's initialisation


@pytest.mark.parametrize(("overrides", "name"), [({}, "cond"), (FLUX, "guidance")])
def test_missing_inputs(overrides, name):
    model, inputs = example(**overrides)
    del inputs[name]
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(**inputs)


def test_unbatched_inputs():
    model, inputs = example()
    with pytest.raises(ValueError, match=r"\[B, tokens, channels\]"):
        model(**{**inputs, "img": inputs["img"][0]})


@pytest.mark.parametrize("training", [True, False])
def test_recomputes_only_while_training(training):
    model, inputs = example(grad_ckpt_settings=(1, 100))
    blocks = []
    inner = model.recompute
    model.recompute = lambda block, *args: (blocks.append(block), inner(block, *args))[1]
    model.train(training)
    model(**inputs).sum().backward()
    assert len(blocks) == (3 if training else 0)
    blocks.clear()
    with torch.no_grad():
        model(**inputs)
    assert not blocks


def test_every_block_has_an_attention_that_can_be_replaced():
    class Doubled(JointAttention):
        def attend(self, q, k, v):
            assert q.shape == k.shape == v.shape == (2, 17, 2, 16)
            return 2 * super().attend(q, k, v)

    model, inputs = example()
    keys, before = list(model.state_dict()), model(**inputs)
    attentions = [name for name, module in model.named_modules() if type(module) is JointAttention]
    assert attentions == [f"{kind}_blocks.{i}.attention" for kind in ("double", "single") for i in range(2)]
    for name in attentions:
        old = model.get_submodule(name)
        model.set_submodule(name, Doubled(old.backend, old.half_split, old.rope_backend))
    assert not torch.allclose(model(**inputs), before)
    assert list(model.state_dict()) == keys


def parts_of(block, x):
    """q, k, v and the MLP's hidden state of a single-stream block."""
    q, k, v_mlp = block.project(x)
    return q, k, *v_mlp.tensor_split((q.shape[-1],), dim=-1)


@pytest.mark.parametrize("overrides", [{}, FLUX])
def test_without_gradients_nothing_but_memory_changes(overrides):
    """Without gradients, activations and the joined result are written in place."""
    model, inputs = example(**overrides)
    given = {key: value.clone() for key, value in inputs.items()}
    with_gradients = model(**inputs).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(**inputs), with_gradients, rtol=0, atol=1e-6)
    assert all(torch.equal(inputs[key], value) for key, value in given.items())


def test_tensor_parallel_share_needs_no_telling():
    """A block whose projections hold one of two heads gives that head's share of the output."""
    for overrides in ({}, FLUX):
        model, _ = example(**overrides)
        block = model.single_blocks[0]
        x = torch.randn(2, 5, 32)
        whole = parts_of(block, x)
        for name in ("linear1", "q_proj", "k_proj", "v_mlp"):
            if (linear := getattr(block, name, None)) is None:
                continue
            sizes = {"linear1": [32, 32, 32, 128], "v_mlp": [32, 128]}.get(name, [32])
            share = nn.Linear(32, sum(sizes) // 2)
            for part in ("weight", "bias"):
                rows = [piece[: len(piece) // 2] for piece in getattr(linear, part).split(sizes)]
                setattr(share, part, nn.Parameter(torch.cat(rows)))
            setattr(block, name, share)
        for full, part in zip(whole, parts_of(block, x), strict=True):
            torch.testing.assert_close(part, full[..., : full.shape[-1] // 2])


def test_config_reads_like_a_dict():
    model, _ = example()
    assert isinstance(model, MMDiTModel)
    assert model.config.get("hidden_size") == 32
    assert "hidden_size" in model.config
    assert "nothing" not in model.config
    assert model.config.get("nothing", 1) == 1
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))


def test_needs_only_a_few_packages():
    """Importing the model must work where only torch, einops, safetensors and mmengine are installed."""
    code = """
import sys
for name in ("transformers diffusers peft accelerate huggingface_hub av pandas ftfy tensorboard colossalai "
             "flash_attn flash_attn_interface xformers liger_kernel triton").split():
    sys.modules[name] = None
import opensora.models.mmdit
"""
    subprocess.run([sys.executable, "-c", code], check=True)
