"""The MMDiT against reference tensors of the original model, and against diffusers' Flux."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.attention import (
    JointAttention,
    Rotary,
    rotary_table,
    rotate_half_split,
    rotate_interleaved,
)
from opensora.models.mmdit.layers import timestep_embedding

FILES = ["mmdit_video", "mmdit_flux", "mmdit_video_fused", "mmdit_highcomp"]
CALL = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond", "guidance")
TOLERANCE = 1e-4


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def load(file):
    fields = MMDiTConfig.__dataclass_fields__
    config = MMDiTConfig.from_dict({key: value for key, value in file.meta["config"].items() if key in fields})
    model = MMDiTModel(config)
    model.load_state_dict(file.weights)
    return model, {key: value for key, value in file.inputs.items() if key in CALL}


@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients(golden, name):
    file = golden(name)
    model, inputs = load(file)
    out = model(**inputs)
    close(out, file.outputs["out"])
    loss = F.mse_loss(out, file.inputs["target"])
    close(loss, file.outputs["mse_loss"])
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert file.grads
    for key, expected in file.grads.items():
        torch.testing.assert_close(gradients[key], expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    close(norm, file.outputs["grad_norm"])


@pytest.mark.parametrize("name", FILES)
def test_parts(golden, name):
    file = golden(name)
    model, inputs = load(file)
    with torch.no_grad():
        img, txt, vec, rope = model.prepare(*(inputs.get(key) for key in CALL))
        close(img, file.outputs["prep_img"])
        close(txt, file.outputs["prep_txt"])
        close(vec, file.outputs["prep_vec"])
        img, txt = model.double_blocks[0](img, txt, vec, rope)
        close(img, file.outputs["double0_img"])
        close(txt, file.outputs["double0_txt"])
        single = model.single_blocks[0](torch.cat((txt, img), dim=1), vec, rope)
        close(single, file.outputs["single0_after_double0"])
    cos, sin = (half.squeeze(2) for half in rope)
    if model.config.use_liger_rope:
        close(cos.repeat(1, 1, 2), file.outputs["pe_cos"])
        close(sin.repeat(1, 1, 2), file.outputs["pe_sin"])
    else:
        matrix = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)).unsqueeze(1)
        close(matrix, file.outputs["pe"])


@pytest.mark.parametrize("name", FILES)
def test_bfloat16(golden, name):
    file = golden(name)
    model, inputs = load(file)
    for key in {"img", "txt", "y_vec", "cond"} & inputs.keys():  # a rounded time would be another time
        inputs[key] = inputs[key].bfloat16()
    with torch.no_grad():
        close(model.bfloat16()(**inputs), file.outputs["out"], 3e-2)


@pytest.mark.parametrize("name", ["mmdit_video", "mmdit_flux"])
def test_recomputing_activations_changes_nothing(golden, name):
    file = golden(name)
    model, inputs = load(file)
    model.grad_ckpt_settings = (1, 100)
    recomputed = []
    inner = model.recompute
    model.recompute = lambda block, *args: (recomputed.append(type(block).__name__), inner(block, *args))[1]
    F.mse_loss(model(**inputs), file.inputs["target"]).backward()
    assert recomputed == ["DoubleStreamBlock", "SingleStreamBlock", "SingleStreamBlock"]
    for key, expected in file.grads.items():
        gradient = model.get_parameter(key).grad
        torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def test_timestep_embedding(golden):
    file = golden("math")
    names = [name for name in file.outputs if name.startswith("timestep_embedding_")]
    assert names
    for name in names:
        close(timestep_embedding(file.inputs["t"], int(name.rsplit("_", 1)[1])), file.outputs[name])


def test_rope_and_attention(golden):
    file = golden("math")
    rope = file.meta["rope"]
    table = rotary_table(file.inputs["ids"], rope["axes_dim"], rope["theta"])
    close(table.cos.squeeze(2).repeat(1, 1, 2), file.outputs["pe_liger_cos"])
    close(table.sin.squeeze(2).repeat(1, 1, 2), file.outputs["pe_liger_sin"])
    q, k, v = (file.inputs[name].transpose(1, 2) for name in "qkv")
    for layout, rotate in (("flux", rotate_interleaved), ("liger", rotate_half_split)):
        close(rotate(q, table).transpose(1, 2), file.outputs[f"q_rope_{layout}"])
        close(rotate(k, table).transpose(1, 2), file.outputs[f"k_rope_{layout}"])
        for backend in ("sdpa", "math"):
            attention = JointAttention(backend, half_split=layout == "liger")
            close(attention(q, k, v, table), file.outputs[f"attention_{layout}"])


def test_layouts_are_a_permutation_of_each_other(golden):
    """Half-split rotation of permuted channels is the permuted interleaved rotation (how weights are converted)."""
    q = golden("math").inputs["q"].transpose(1, 2)
    angle = torch.linspace(0, 3, q.shape[1] * q.shape[-1] // 2).view(1, q.shape[1], 1, -1)
    rope = Rotary(angle.cos(), angle.sin())

    def permute(x):
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)

    close(rotate_half_split(permute(q), rope), permute(rotate_interleaved(q, rope)))


def test_full_size_key_lists(golden_dir):
    """Names and shapes of the released files, in order."""
    released = {"in_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0}
    released |= {"num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000}
    released |= {"qkv_bias": True, "guidance_embed": False, "cond_embed": True, "fused_qkv": False}
    variants = {
        "opensora_v2": {},
        "hc": {"in_channels": 128, "patch_size": 1},
        "t2v_nocond": {"cond_embed": False},
        "flux": {"cond_embed": False, "guidance_embed": True, "fused_qkv": True},
    }
    for name, overrides in variants.items():
        with torch.device("meta"):
            state = MMDiTModel(MMDiTConfig.from_dict(released | overrides)).state_dict()
        listed = (golden_dir.parent / f"reference/keys/keys_mmdit_{name}.txt").read_text().splitlines()
        assert [f"{key}\t{tuple(value.shape)}" for key, value in state.items()] == listed


def to_diffusers(state, depth, depth_single):
    """State dict of diffusers' FluxTransformer2DModel from ours with fused projections."""
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for i, layer in enumerate(("in_layer", "out_layer"), 1):
            names[f"{ours}_in.{layer}"] = f"time_text_embed.{theirs}_embedder.linear_{i}"
    for i in range(depth):
        for stream, context, added, out in (("img", "", "", "to_out.0"), ("txt", "_context", "added_", "to_add_out")):
            ours, theirs = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            names[f"{ours}_mod.lin"] = f"{theirs}.norm1{context}.linear"
            names[f"{ours}_mlp.0"] = f"{theirs}.ff{context}.net.0.proj"
            names[f"{ours}_mlp.2"] = f"{theirs}.ff{context}.net.2"
            names[f"{ours}_attn.proj"] = f"{theirs}.attn.{out}"
            names[f"{ours}_attn.norm.query_norm"] = f"{theirs}.attn.norm_{added}q"
            names[f"{ours}_attn.norm.key_norm"] = f"{theirs}.attn.norm_{added}k"
    for i in range(depth_single):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        names[f"{ours}.modulation.lin"] = f"{theirs}.norm.linear"
        names[f"{ours}.linear2"] = f"{theirs}.proj_out"
        names[f"{ours}.norm.query_norm"] = f"{theirs}.attn.norm_q"
        names[f"{ours}.norm.key_norm"] = f"{theirs}.attn.norm_k"
    converted = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        kind = "weight" if kind == "scale" else kind
        block = ".".join(module.split(".")[:2]).replace("double_", "").replace("blocks", "transformer_blocks")
        if module.endswith(".qkv"):
            into = ("to_q", "to_k", "to_v") if "img_attn" in module else ("add_q_proj", "add_k_proj", "add_v_proj")
            parts = zip((f"{block}.attn.{name}" for name in into), value.chunk(3), strict=True)
        elif module.endswith(".linear1"):
            hidden = state["img_in.bias"].numel()
            into = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            parts = zip(into, value.split([hidden] * 3 + [len(value) - 3 * hidden]), strict=True)
        elif "adaLN_modulation" in module:  # (shift, scale) here, (scale, shift) there
            parts = [("norm_out.linear", torch.cat(value.chunk(2)[::-1]))]
        else:
            parts = [(names[module], value)]
        converted.update((f"{name}.{kind}", part) for name, part in parts)
    return converted


def split_and_half_split(state, head_dim):
    """Split projections with half-split rotary layout, from fused ones with interleaved layout."""

    def permute(rows):  # within each head: even channels first
        return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    converted = {}
    for key, value in state.items():
        if ".qkv." in key or ".linear1." in key:
            hidden = state["img_in.bias"].numel()
            q, k, rest = value.split([hidden, hidden, len(value) - 2 * hidden])
            name = {".qkv.": "v_proj", ".linear1.": "v_mlp"}[".qkv." if ".qkv." in key else ".linear1."]
            for part, rows in (("q_proj", permute(q)), ("k_proj", permute(k)), (name, rest)):
                converted[key.replace("linear1" if "linear1" in key else "qkv", part)] = rows
        elif key.endswith("_norm.scale"):
            converted[key] = permute(value)
        else:
            converted[key] = value
    return converted


@pytest.fixture(scope="module")
def flux_pair():
    """Our model and diffusers' with the same random weights, the same inputs, and diffusers' output."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "axes_dim": [4, 6, 6], "theta": 10000, "depth": 2, "depth_single_blocks": 3}
    config = MMDiTConfig(
        **sizes, vec_in_dim=24, context_in_dim=40, hidden_size=64, mlp_ratio=4.0, num_heads=4, qkv_bias=True,
        guidance_embed=True,
    )  # fmt: skip
    ours = MMDiTModel(config)
    for name, parameter in ours.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.normal_(parameter, 1, 0.2)
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=40, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config.depth, config.depth_single_blocks))
    ids = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).float()
    inputs = {
        "img": torch.randn(2, 60, 16), "img_ids": ids.expand(2, -1, -1), "txt": torch.randn(2, 7, 40),
        "txt_ids": torch.zeros(2, 7, 3), "timesteps": torch.tensor([0.3, 0.9]), "y_vec": torch.randn(2, 24),
        "guidance": torch.tensor([3.5, 1.0]),
    }  # fmt: skip
    expected = theirs(
        hidden_states=inputs["img"], encoder_hidden_states=inputs["txt"], pooled_projections=inputs["y_vec"],
        timestep=inputs["timesteps"], guidance=inputs["guidance"], img_ids=ids, txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )[0]  # fmt: skip
    return ours, theirs, inputs, expected


def test_equals_diffusers(flux_pair):
    ours, theirs, inputs, expected = flux_pair
    out = ours(**inputs)
    close(out, expected, 1e-5)
    out.square().mean().backward()
    expected.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    theirs = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, gradient in to_diffusers(gradients, 2, 3).items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-3, atol=1e-6)


def test_other_layouts_equal_diffusers(flux_pair):
    ours, _, inputs, expected = flux_pair
    config = MMDiTConfig(**{**vars(ours.config), "fused_qkv": False, "use_liger_rope": True})
    model = MMDiTModel(config)
    model.load_state_dict(split_and_half_split(ours.state_dict(), config.head_dim))
    close(model(**inputs), expected, 1e-5)


LAYOUTS = {
    "video": {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True},
    "video_fused": {"cond_embed": True, "fused_qkv": True, "qkv_bias": False},
    "highcomp": {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True, "patch_size": 1},
    "flux": {"guidance_embed": True},
}


def wave(shape, seed, scale=1.0):
    """Numbers without a random generator: the same everywhere and always."""
    count = torch.Size(shape).numel()
    return (scale * torch.sin(torch.arange(1, count + 1, dtype=torch.float64) ** 2 * 0.1 + seed)).float().view(shape)


def frozen_output(layout):
    """Output of a tiny model of one layout, with weights and inputs given by a formula."""
    sizes = {"in_channels": 8, "vec_in_dim": 6, "context_in_dim": 10, "hidden_size": 32, "mlp_ratio": 2.0}
    sizes |= {"num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000}
    config = MMDiTConfig.from_dict({**sizes, "qkv_bias": True, "guidance_embed": False, **LAYOUTS[layout]})
    model = MMDiTModel(config)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.copy_(wave(parameter.shape, seed, scale) + (1 if name.endswith("scale") else 0))
        ids = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3))[None]
        return model(
            img=wave((1, 12, 8), 101),
            img_ids=ids,
            txt=wave((1, 3, 10), 102),
            txt_ids=torch.zeros(1, 3, 3),
            timesteps=torch.tensor([0.7]),
            y_vec=wave((1, 6), 103),
            cond=wave((1, 12, config.cond_channels), 104) if config.cond_embed else None,
            guidance=torch.tensor([3.5]) if config.guidance_embed else None,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_outputs(layout):
    """Guards the numbers where the reference files are not at hand; frozen when those were matched."""
    frozen = load_file(Path(__file__).with_name("frozen_mmdit.safetensors"))
    close(frozen_output(layout), frozen[layout])
