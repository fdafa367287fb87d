"""Converting weights: every change of layout is exact and undone exactly, and the model computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.attention import JointAttention
from opensora.models.mmdit.loading import layout_metadata
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors
from tools.convert import checkpoint, from_diffusers, mmdit
from tools.convert.layouts import change_rope, convert_layout, fuse_qkv, model_config, split_qkv

ROOT = Path(__file__).parents[3]
SIZES = {"in_channels": 16, "vec_in_dim": 12, "context_in_dim": 20, "hidden_size": 48, "mlp_ratio": 2.3, "num_heads": 3}
SIZES |= {"depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True}
SIZES |= {"guidance_embed": False, "cond_embed": True}
FLUX = {"mlp_ratio": 4.0, "guidance_embed": True, "cond_embed": False}
LAYOUTS = [(fused, half) for fused in (True, False) for half in (True, False)]  # fused_qkv, use_liger_rope
WORDS = {(True, "qkv"): "fused", (False, "qkv"): "split", (True, "rope"): "half-split", (False, "rope"): "interleaved"}


def make(fused=True, half_split=False, **overrides):
    """A model with random weights, the scales of the norms among them."""
    torch.manual_seed(0)
    model = MMDiTModel(MMDiTConfig(**{**SIZES, **overrides}, fused_qkv=fused, use_liger_rope=half_split))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def same(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).float()
    return {
        "img": torch.randn(2, 24, 16, dtype=dtype), "img_ids": ids.expand(2, -1, -1),
        "txt": torch.randn(2, 5, 20, dtype=dtype), "txt_ids": torch.zeros(2, 5, 3),
        "timesteps": torch.tensor([0.3, 0.9], dtype=dtype), "y_vec": torch.randn(2, 12, dtype=dtype),
    }  # fmt: skip


def precise(half_split):
    """The rotation in float64 (the model's own rounds to float32)."""

    def turn(x, rope):
        cos, sin = (half.double() for half in rope)
        a, b = x.chunk(2, dim=-1) if half_split else (x[..., 0::2], x[..., 1::2])
        pairs = (a * cos - b * sin, a * sin + b * cos)
        return torch.cat(pairs, dim=-1) if half_split else torch.stack(pairs, dim=-1).flatten(-2)

    return lambda q, k, rope: (turn(q, rope), turn(k, rope))


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("overrides", [{}, FLUX, {"qkv_bias": False}])
def test_same_output_in_every_layout(source, overrides):
    def outputs(model):
        model = model.double()
        for module in model.modules():
            if isinstance(module, JointAttention):
                module.rotate = precise(module.half_split)
        extra = {"guidance": torch.tensor([3.5, 1.0]).double()} if model.config.guidance_embed else {}
        if model.config.cond_embed:
            extra["cond"] = torch.linspace(-1, 1, 2 * 24 * 20, dtype=torch.float64).view(2, 24, 20)
        with torch.no_grad():
            return model(**inputs(torch.float64), **extra)

    original = make(*source, **overrides)
    state, expected = original.state_dict(), outputs(original)
    for fused, half_split in LAYOUTS:
        change = half_split if half_split != source[1] else None
        converted = convert_layout(state, fused_qkv=fused, change_to_half_split=change)
        model = make(fused, half_split, **overrides)
        model.load_state_dict(converted)
        torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-10)
        back = change if change is None else not change
        same(convert_layout(converted, fused_qkv=source[0], change_to_half_split=back), state)


def test_fusing_names_a_missing_part():
    state = split_qkv(make().state_dict())
    del state["single_blocks.0.v_mlp.bias"]
    with pytest.raises(UserError, match=r"has single_blocks\.0\.q_proj\.bias but not single_blocks\.0\.v_mlp\.bias"):
        fuse_qkv(state)


def test_steps_are_inverse_and_reorder_only_q_and_k():
    state = make().state_dict()
    same(fuse_qkv(split_qkv(state)), state)
    reordered = change_rope(state, True)
    same(change_rope(reordered, False), state)
    changed = {key.rsplit(".", 2)[-2] for key, value in state.items() if not torch.equal(value, reordered[key])}
    assert changed == {"qkv", "linear1", "query_norm", "key_norm"}
    for key in ("double_blocks.0.img_attn.qkv.bias", "single_blocks.1.linear1.weight"):
        assert torch.equal(reordered[key][96:], state[key][96:])  # v and the MLP stay


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_command_between_all_layouts(tmp_path, source, target):
    model = make(*source)
    first, second, third = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    save_safetensors(model.state_dict(), first, {"written_by": "a test"})

    def flags(layout):
        return ["--qkv", WORDS[layout[0], "qkv"], "--rope", WORDS[layout[1], "rope"]]

    command = [first, second, *flags(target), "--from-rope", WORDS[source[1], "rope"]]
    if source == target:
        with pytest.raises(UserError, match="in that layout already"):
            mmdit.main(command)
        return
    mmdit.main(command)
    wanted = make(*target)
    assert metadata(second) == {"format": "pt", "written_by": "a test", **layout_metadata(wanted.config)}
    wanted.load_state_dict(load_file(second))
    mmdit.main([second, third, *flags(source)])  # the layout is recorded now
    same(load_file(third), model.state_dict())


def test_loading_in_the_wrong_layout_names_the_key(tmp_path):
    path, out = str(tmp_path / "flux1-dev.safetensors"), str(tmp_path / "start.safetensors")
    save_safetensors(make(**FLUX).state_dict(), path)
    mmdit.main([path, out, "--rope", "half-split", "--from-rope", "interleaved"])
    config = {"type": "flux", **SIZES, **FLUX, "from_pretrained": out}
    with pytest.raises(UserError, match=r"records use_liger_rope=True.*set model\.use_liger_rope=True"):
        build_module({**config, "fused_qkv": True, "use_liger_rope": False}, MODELS)
    with pytest.raises(UserError, match=r"set model\.fused_qkv=True"):
        build_module({**config, "fused_qkv": False, "use_liger_rope": True}, MODELS)
    build_module({**config, "fused_qkv": True, "use_liger_rope": True}, MODELS)


def test_qkv_alone_leaves_an_unknown_rope_unrecorded(tmp_path):
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_safetensors(make().state_dict(), path)
    mmdit.main([str(path), str(out), "--qkv", "split", "--dtype", "bf16"])
    assert metadata(out) == {"format": "pt", "fused_qkv": "False"}
    same(load_file(out), {key: value.bfloat16() for key, value in split_qkv(make().state_dict()).items()})


@pytest.fixture(scope="module")
def theirs():
    """A tiny Flux of diffusers with random weights, and its output."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    x = inputs()
    with torch.no_grad():
        out = model(
            hidden_states=x["img"], encoder_hidden_states=x["txt"], pooled_projections=x["y_vec"],
            timestep=x["timesteps"], guidance=torch.tensor([3.5, 1.0]), img_ids=x["img_ids"][0],
            txt_ids=torch.zeros(5, 3), return_dict=False,
        )[0]  # fmt: skip
    return model, out


@pytest.mark.parametrize(("fused", "half_split"), LAYOUTS)
@pytest.mark.parametrize("kind", ["file", "shards", "pipeline"])
def test_from_diffusers(theirs, tmp_path, kind, fused, half_split):
    model, expected = theirs
    folder = tmp_path / "transformer" if kind == "pipeline" else tmp_path / "flux"
    model.save_pretrained(folder, max_shard_size="100KB" if kind == "shards" else "1GB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists() == (kind == "shards")
    sources = {"file": folder / "diffusion_pytorch_model.safetensors", "shards": folder, "pipeline": tmp_path}
    out = tmp_path / "ours.safetensors"
    flags = ["--qkv", WORDS[fused, "qkv"], "--rope", WORDS[half_split, "rope"]]
    from_diffusers.main([str(sources[kind]), str(out), *(flags if (fused, half_split) != (True, False) else [])])
    config = {"type": "flux", **SIZES, **FLUX, "fused_qkv": fused, "use_liger_rope": half_split}
    ours = build_module({**config, "from_pretrained": str(out)}, MODELS)
    assert metadata(out) == {"format": "pt", **layout_metadata(ours.config)}
    with torch.no_grad():
        result = ours(**inputs(), guidance=torch.tensor([3.5, 1.0]))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_sharded_folder_to_one_file(tmp_path):
    state = make().state_dict()
    run = tmp_path / "run" / "epoch0-global_step7"
    for folder in (tmp_path / "shards", run / "model"):
        folder.mkdir(parents=True)
        names = list(state)
        weight_map = {}
        for i, part in enumerate((names[::2], names[1::2])):
            save_file({key: state[key] for key in part}, folder / f"model-{i}.safetensors", {"fused_qkv": "True"})
            weight_map.update(dict.fromkeys(part, f"model-{i}.safetensors"))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "running_states.json").write_text("{}")
    ema = {key: value + 1 for key, value in state.items()}
    save_safetensors(ema, run / "ema.safetensors", {"use_liger_rope": "False"})
    for i, source in enumerate((tmp_path / "shards", tmp_path / "run", run)):
        out = tmp_path / f"{i}.safetensors"
        checkpoint.main([str(source), str(out)])
        same(load_file(out), state)
        assert metadata(out) == {"format": "pt", "fused_qkv": "True"}
    checkpoint.main([str(tmp_path / "run"), str(out), "--ema", "--dtype", "fp16", "--overwrite"])
    same(load_file(out), {key: value.half() for key, value in ema.items()})
    assert metadata(out) == {"format": "pt", "use_liger_rope": "False"}
    with pytest.raises(UserError, match="--ema: .*shards has no averaged weights"):
        checkpoint.main([str(tmp_path / "shards"), str(out), "--ema", "--overwrite"])
    with pytest.raises(UserError, match="checkpoint .*nowhere does not exist"):
        checkpoint.main([str(tmp_path / "nowhere"), str(out), "--overwrite"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with right and wrong sources."""
    folder = tmp_path_factory.mktemp("files")
    state = make().state_dict()
    half = {key: value for key, value in split_qkv(state).items() if "0.img_attn.k_proj" not in key}
    cut = {key: value for key, value in state.items() if key != "double_blocks.1.txt_mlp.2.bias"}
    contents = {
        "plain": state,
        "half": half,
        "cut": cut,
        "mixed": {**state, "double_blocks.0.img_attn.q_proj.weight": torch.zeros(2)},
        "vae": {"encoder.conv_in.weight": torch.zeros(2)},
        "diffusers": {"transformer_blocks.0.attn.to_q.weight": torch.zeros(2)},
        "adapter": {
            "x_embedder.weight": torch.zeros(2),
            "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2),
        },
        "lone_mlp": {
            "x_embedder.weight": torch.zeros(2),
            "single_transformer_blocks.0.proj_mlp.weight": torch.zeros(2, 2),
        },
    }
    for name, content in contents.items():
        save_safetensors(content, folder / f"{name}.safetensors")
    save_safetensors(state, folder / "recorded.safetensors", {"fused_qkv": "True", "use_liger_rope": "False"})
    (folder / "broken.safetensors").write_bytes(b"x" * 50)
    return folder


@pytest.mark.parametrize(
    ("program", "source", "flags", "said"),
    [
        (mmdit, "absent", "--qkv split", "No weights at .*absent.safetensors"),
        (mmdit, "broken", "--qkv split", "broken.safetensors is truncated or not a safetensors file"),
        (mmdit, "plain", "", "give --qkv fused|split, --rope"),
        (mmdit, "plain", "--qkv fused", r"plain.safetensors is in that layout already \(--qkv fused\)"),
        (mmdit, "recorded", "--rope interleaved", r"layout already \(--rope interleaved\)"),
        (mmdit, "plain", "--rope half-split", "does not record its rotary layout.*give --from-rope"),
        (mmdit, "recorded", "--rope interleaved --from-rope half-split", "--from-rope half-split is wrong"),
        (mmdit, "vae", "--qkv split", "vae.safetensors: it is not an MMDiT"),
        (mmdit, "diffusers", "--qkv split", "layout of diffusers: use tools/convert/from_diffusers.py"),
        (mmdit, "half", "--qkv fused", r"not a whole MMDiT: it has no double_blocks\.0\.img_attn\.k_proj\.weight"),
        (mmdit, "mixed", "--qkv split", "both fused projections .* and split ones"),
        (mmdit, "cut", "--qkv split", r"not a whole MMDiT: it has no double_blocks\.1\.txt_mlp\.2\.bias"),
        (mmdit, "plain", "--qkv split --dtype fp64", "unknown dtype 'fp64'"),
        (from_diffusers, "absent", "", "No weights at .*absent.safetensors"),
        (from_diffusers, "vae", "", "vae.safetensors: it is not a Flux transformer in the layout of diffusers$"),
        (from_diffusers, "plain", "", "in our names already: use tools/convert/mmdit.py"),
        (from_diffusers, "adapter", "", r"FluxTransformer2DModel does not have: .*lora_A\.weight"),
        (from_diffusers, "lone_mlp", "", r"proj_mlp but not attn\.to_v"),
        (from_diffusers, "diffusers", "--qkv split", "it lacks x_embedder.weight"),
    ],
)
def test_wrong_inputs_are_named(files, tmp_path, program, source, flags, said):
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=said):
        program.main([str(files / f"{source}.safetensors"), str(out), *flags.split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [mmdit, from_diffusers, checkpoint])
def test_outputs_are_guarded(files, tmp_path, program):
    source, out = str(files / "plain.safetensors"), tmp_path / "out.safetensors"
    out.write_text("precious")
    flags = ["--qkv", "split"] if program is mmdit else []
    with pytest.raises(UserError, match="exists; choose another name or give --overwrite"):
        program.main([source, str(out), *flags])
    assert out.read_text() == "precious"
    with pytest.raises(UserError, match="ends in .safetensors"):
        program.main([source, str(tmp_path / "out.pt"), *flags])


def test_a_file_may_replace_itself(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(make().state_dict(), path)
    mmdit.main([str(path), str(path), "--qkv", "split", "--overwrite"])
    same(load_file(path), split_qkv(make().state_dict()))


@pytest.mark.parametrize("overrides", [{}, {"depth": 0}, {"depth_single_blocks": 0}, {"patch_size": 1}])
def test_config_found_in_weights(overrides):
    config = make(**overrides).config
    found = model_config({key: tuple(value.shape) for key, value in make(**overrides).state_dict().items()})
    for key in ("hidden_size", "num_heads", "depth", "depth_single_blocks", "mlp_hidden", "cond_channels"):
        assert getattr(found, key) == getattr(config, key)


def test_programs_run_as_scripts(files, tmp_path):
    """Typed as in the documentation, from another folder: a result, and status 2 with one line for a wrong input."""
    out = tmp_path / "out.safetensors"
    script = str(ROOT / "tools/convert/mmdit.py")
    command = [sys.executable, script, str(files / "recorded.safetensors"), str(out), "--rope", "half-split"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.fused_qkv=True, model.use_liger_rope=True" in done.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={}, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
