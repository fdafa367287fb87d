"""Converting adapters: exact both ways, and the same to PEFT, to diffusers and to our own reader."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora.diffusion.lora import apply_loras, read_loras
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors
from tools.convert import lora
from tools.convert.layouts import convert_layout, from_diffusers
from tools.convert.lora_weights import low_rank

SIZES = dict(
    in_channels=16, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False, cond_embed=False,
    patch_size=2,
)  # fmt: skip
HEADS = ["--head-dim", "16"]
SPLIT = ["q_proj", "k_proj", "v_proj", "v_mlp", "proj", "linear2", "img_mod.lin", "adaLN_modulation.1", "txt_in"]
FUSED = ["qkv", "linear1", "txt_mlp.0", "final_layer.linear"]


def mmdit(fused=False, half_split=False):
    torch.manual_seed(0)
    model = MMDiTModel(MMDiTConfig(**SIZES, fused_qkv=fused, use_liger_rope=half_split)).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def train(folder: Path, model=None, scramble=True, dtype=torch.float32, rope="False", **settings) -> Path:
    """An adapter as PEFT itself saves it."""
    peft = pytest.importorskip("peft")
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": SPLIT, "init_lora_weights": not scramble}
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model or mmdit(), peft.LoraConfig(**{**defaults, **settings}))
    tuned.to(dtype).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_safetensors(load_file(file), file, {"use_liger_rope": rope} if rope else {})
    return folder


def run(command: str, *words: object) -> None:
    lora.main([command, *map(str, words)])


def same_adapter(one: Path, other: Path) -> None:
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name
    assert config(one) == config(other)


def config(folder: Path):
    return json.loads((folder / "adapter_config.json").read_text())


def metadata(file: Path):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def weights(model, *adapters):
    return apply_loras(model, read_loras([str(adapter) for adapter in adapters], model)).state_dict()


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


PATTERNS = {
    "rank_pattern": {"img_attn.q_proj": 2, "v_mlp": 6, "linear2": 3},
    "alpha_pattern": {"img_attn.q_proj": 4, "v_mlp": 12, "linear2": 5, "txt_in": 1.5},
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PATTERNS,
        {"scramble": False},  # untrained: all of B is zero
        {"target_modules": ["q_proj", "v_mlp"], "dtype": torch.bfloat16},
        {"target_modules": ["k_proj", "linear2"], "alpha_pattern": {"txt_attn.k_proj": 2}},
        {"alpha_pattern": {"img_attn.v_proj": 16, "single_blocks.0.k_proj": 1}},  # powers of 2 apart
        {"use_rslora": True},
        {"model": lambda: mmdit(fused=True), "target_modules": FUSED, **PATTERNS},
        {"model": lambda: mmdit(fused=True), "target_modules": FUSED, "r": 6, "lora_alpha": 4},
    ],
)
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_there_and_back_bit_by_bit(tmp_path, settings, to):
    fused = "model" in settings
    model = {"model": settings["model"]()} if fused else {}
    start = train(tmp_path / "start", **{**settings, **model})
    there, back = tmp_path / "there.safetensors", tmp_path / "back"
    run("convert", start, there, "--to", to)
    run("convert", there, back, "--to", "peft", "--qkv", "fused" if fused else "split")
    same_adapter(start, back)
    close(weights(mmdit(fused), start), weights(mmdit(fused), there))
    other = tmp_path / "other.safetensors"  # through the third format, and in the other rotary layout for a while
    run("convert", there, other, "--to", "kohya" if to == "diffusers" else "diffusers")
    run("convert", other, tmp_path / "turned", "--to", "peft", "--qkv", "fused", "--rope", "half-split", *HEADS)
    close(
        convert_layout(weights(mmdit(fused), start), fused_qkv=True, change_to_half_split=True),
        weights_of_turned(fused, tmp_path / "turned"),
    )
    run("convert", tmp_path / "turned", there, "--to", to, "--rope", "interleaved", *HEADS, "--overwrite")
    qkv = "fused" if fused else "split"
    run("convert", there, back, "--to", "peft", "--qkv", qkv, "--overwrite")
    same_adapter(start, back)


def weights_of_turned(fused, adapter):
    model = mmdit(fused=True, half_split=True)
    model.load_state_dict(convert_layout(mmdit(fused).state_dict(), fused_qkv=True, change_to_half_split=True))
    return weights(model, adapter)


def test_dora_and_biases(tmp_path):
    start = train(tmp_path / "start", use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "v_mlp"])
    run("convert", start, tmp_path / "fused", "--to", "peft", "--qkv", "fused")
    run("convert", tmp_path / "fused", tmp_path / "back", "--to", "peft", "--qkv", "split")
    same = {key: value for key, value in config(start).items() if "pattern" not in key}
    assert (
        load_file(start / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "back" / "adapter_model.safetensors").keys()
    )
    assert {key: config(tmp_path / "fused")[key] for key in ("use_dora", "r")} == {"use_dora": True, "r": 12}
    assert same["use_dora"]
    model = mmdit(fused=True)
    model.load_state_dict(convert_layout(mmdit().state_dict(), fused_qkv=True))
    close(weights(model, tmp_path / "fused"), convert_layout(weights(mmdit(), start), fused_qkv=True))
    with pytest.raises(UserError, match="DoRA, and .* use --to peft"):
        run("convert", start, tmp_path / "no.safetensors", "--to", "diffusers")
    run("convert", start, tmp_path / "dora.safetensors", "--to", "kohya", "--qkv", "split")
    close(weights(mmdit(), tmp_path / "dora.safetensors"), weights(mmdit(), start))
    run("convert", tmp_path / "dora.safetensors", tmp_path / "again", "--to", "peft")
    same_adapter(start, tmp_path / "again")
    biased = train(tmp_path / "biased", lora_bias=True)
    with pytest.raises(UserError, match="has a bias of its adapter"):
        run("convert", biased, tmp_path / "no.safetensors", "--to", "kohya", "--qkv", "split")


@pytest.fixture
def flux():
    """A tiny Flux of diffusers, and what it is called with."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).float()
    x = dict(
        hidden_states=torch.randn(1, 6, 16), encoder_hidden_states=torch.randn(1, 4, 12), img_ids=ids,
        pooled_projections=torch.randn(1, 8), timestep=torch.tensor([0.5]), txt_ids=torch.zeros(4, 3),
    )  # fmt: skip
    return model, x


def ours_of(flux, fused):
    model = MMDiTModel(MMDiTConfig(**{**SIZES, "mlp_ratio": 4.0}, fused_qkv=fused, use_liger_rope=False))
    model.load_state_dict(convert_layout(from_diffusers(flux.state_dict()), fused_qkv=fused))
    return model.requires_grad_(False)


def called(model, x):
    return model(
        img=x["hidden_states"], img_ids=x["img_ids"][None], txt=x["encoder_hidden_states"], txt_ids=x["txt_ids"][None],
        timesteps=x["timestep"], y_vec=x["pooled_projections"],
    )  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"proj": 2, "linear2": 5}, "alpha_pattern": {"proj": 3}}])
def test_diffusers_loads_what_is_written(tmp_path, flux, fused, patterns):
    """Our model with PEFT's own adapter and diffusers' with the converted file give the same."""
    peft = pytest.importorskip("peft")
    from diffusers.loaders import FluxLoraLoaderMixin

    theirs, x = flux
    before = called(ours_of(theirs, fused), x)
    targets = FUSED if fused else SPLIT
    start = train(tmp_path / "start", ours_of(theirs, fused), target_modules=targets, **patterns)
    tuned, again = (ours_of(theirs, fused) for _ in range(2))
    expected = called(peft.PeftModel.from_pretrained(tuned, str(start)), x)
    assert (expected - before).abs().max() > 0.01
    file = tmp_path / "pytorch_lora_weights.safetensors"
    run("convert", start, file, "--to", "diffusers")
    state, alphas, facts = FluxLoraLoaderMixin.lora_state_dict(file, return_alphas=True, return_lora_metadata=True)
    theirs.load_lora_adapter(state, network_alphas=alphas, metadata=facts, adapter_name="ours")
    result = theirs(**x, return_dict=False)[0]
    saved = tmp_path / "theirs"
    theirs.save_lora_adapter(saved, adapter_name="ours")
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    run("convert", next(saved.glob("*.safetensors")), tmp_path / "back", "--to", "peft", "--qkv",
        "fused" if fused else "split")  # fmt: skip
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "back"))
    assert one.keys() == two.keys()
    tuned = peft.PeftModel.from_pretrained(again, str(tmp_path / "back"))
    torch.testing.assert_close(called(tuned, x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_diffusers_converts_kohyas_file_to_the_same(tmp_path, flux, fused):
    """Their reader of Kohya's files, which knows only the released sizes of single blocks, comes to our outputs."""
    from diffusers.loaders import FluxLoraLoaderMixin

    theirs, x = flux
    model = ours_of(theirs, fused)
    targets = r"double_blocks.*\.(qkv|q_proj|v_proj|proj|txt_mlp\.0|img_mod\.lin)|.*\.linear2|.*modulation\.lin"
    start = train(tmp_path / "start", ours_of(theirs, fused), target_modules=targets, lora_alpha=2)
    file = tmp_path / "kohya.safetensors"
    run("convert", start, file, "--to", "comfyui")
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(file, return_alphas=True)
    theirs.load_lora_adapter(state, network_alphas=alphas, adapter_name="kohya")
    result = theirs(**x, return_dict=False)[0]
    torch.testing.assert_close(
        result, called(apply_loras(model, read_loras([str(start)], model)), x), rtol=0, atol=2e-5
    )


def test_linear1_of_the_released_size_to_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers.loaders import FluxLoraLoaderMixin

    torch.manual_seed(0)
    name = "single_transformer_blocks.3"
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    state = {}
    for part, size in rows.items():
        state[f"transformer.{name}.{part}.lora_A.weight"] = torch.randn(2, 3072)
        state[f"transformer.{name}.{part}.lora_B.weight"] = torch.randn(size, 2)
    save_file(state, tmp_path / "a.safetensors")
    run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "kohya")
    found = FluxLoraLoaderMixin.lora_state_dict(tmp_path / "b.safetensors")
    assert found.keys() == state.keys()
    for part in rows:
        for key in (f"transformer.{name}.{part}.lora_{matrix}.weight" for matrix in "AB"):
            assert torch.equal(found[key], state[key])
    run("convert", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "diffusers")
    back = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_alphas_and_facts_of_a_kohya_file(tmp_path):
    start = train(tmp_path / "start", dtype=torch.float16)
    run("convert", start, tmp_path / "a.safetensors", "--to", "kohya")
    state = load_file(tmp_path / "a.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert state[f"{name}.lora_down.weight"].shape == (12, 32)
    assert state[f"{name}.alpha"] == 24
    assert state[f"{name}.alpha"].dtype == torch.float16
    assert not state[f"{name}.lora_up.weight"][:32, 4:].any()
    facts = metadata(tmp_path / "a.safetensors")
    assert facts["use_liger_rope"] == "False"
    assert facts["fused_qkv"] == "True"
    run("convert", tmp_path / "a.safetensors", tmp_path / "b", "--to", "peft", "--qkv", "split")
    run("convert", tmp_path / "b", tmp_path / "c.safetensors", "--to", "kohya")
    again = load_file(tmp_path / "c.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_merge(tmp_path, dtype):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_safetensors(mmdit().state_dict(), base, {"use_liger_rope": "False"})
    one = train(tmp_path / "one")
    run("convert", one, tmp_path / "two.safetensors", "--to", "diffusers")
    run(
        "merge",
        base,
        f"{one}@0.5",
        f"{tmp_path / 'two.safetensors'}@-0.25",
        out,
        *(["--dtype", dtype] if dtype else []),
    )
    merged = load_file(out)
    expected = weights(mmdit(), f"{one}@0.25")
    if dtype:
        expected = {key: value.bfloat16() for key, value in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-2 if dtype else 1e-5, atol=1e-5)
    assert metadata(out)["use_liger_rope"] == "False"
    save_safetensors(mmdit().state_dict(), base)
    with pytest.raises(UserError, match="does not record its rotary layout.*--from-rope"):
        run("merge", base, tmp_path / "two.safetensors", out, "--overwrite")


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers"])
def test_extract_finds_what_was_merged(tmp_path, to, capsys):
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_safetensors(mmdit().state_dict(), base, {"use_liger_rope": "False"})
    start = train(tmp_path / "start")
    run("merge", base, start, tuned)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    run("extract", base, tuned, out, "--rank", 4, "--to", to)
    assert "100.00% of the squared difference is kept" in capsys.readouterr().out
    close(weights(mmdit(), out), weights(mmdit(), start))
    run("extract", base, tuned, out, "--rank", 2, "--to", to, "--overwrite")
    text = capsys.readouterr().out
    share = float(text.partition("differ; ")[2].partition("%")[0])
    plain, near, whole = mmdit().state_dict(), weights(mmdit(), out), load_file(tuned)
    lost, all_of_it = (
        sum((whole[key] - other[key]).double().square().sum() for key in whole) for other in (near, plain)
    )
    assert 30 < share < 99
    assert abs(share - 100 * float(1 - lost / all_of_it)) < 0.02
    with pytest.raises(UserError, match="have the same matrices"):
        run("extract", base, base, tmp_path / "none", "--rank", 2)


@pytest.mark.parametrize("place", ["base", "tuned"])
def test_weights_that_are_not_finite_are_refused(tmp_path, place):
    state = mmdit().state_dict()
    save_safetensors(state, tmp_path / "base.safetensors")
    save_safetensors({key: value + 1 for key, value in state.items()}, tmp_path / "tuned.safetensors")
    key = "single_blocks.1.linear2.weight"
    state[key] = torch.full_like(state[key], torch.nan)
    save_safetensors(state, tmp_path / f"{place}.safetensors")
    with pytest.raises(UserError, match=rf"{place}.safetensors: {key} is not finite"):
        run("extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", "--rank", 2)
    assert not (tmp_path / "out").exists()


def test_large_matrices_are_decomposed_as_well():
    torch.manual_seed(0)
    matrix = torch.randn(600, 8) @ torch.randn(8, 700) + 1e-3 * torch.randn(600, 700)
    up, down = low_rank(matrix, 8)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (matrix - u[:, :8] * s[:8] @ v[:8]).norm()
    assert (matrix - up @ down).norm() < 1.001 * best


def test_what_cannot_be_exact_is_refused(tmp_path):
    odd = train(tmp_path / "odd", alpha_pattern={"img_attn.k_proj": 7})
    with pytest.raises(UserError, match=r"img_attn\.k_proj: its alpha / rank is 1\.75.*cannot be fused exactly"):
        run("convert", odd, tmp_path / "a.safetensors", "--to", "kohya")
    root = train(tmp_path / "root", r=3, use_rslora=True)
    with pytest.raises(UserError, match="square root of the rank"):
        run("convert", root, tmp_path / "a.safetensors", "--to", "kohya")
    unknown = train(tmp_path / "unknown", rope=None)
    with pytest.raises(UserError, match="does not record its rotary layout: give --from-rope"):
        run("convert", unknown, tmp_path / "a.safetensors", "--to", "diffusers")
    run("convert", unknown, tmp_path / "a.safetensors", "--to", "diffusers", "--from-rope", "interleaved")
    with pytest.raises(UserError, match="exists; choose another name"):
        run("convert", unknown, tmp_path / "a.safetensors", "--to", "diffusers", "--from-rope", "interleaved")
    with pytest.raises(UserError, match="writes a folder"):
        run("convert", unknown, tmp_path / "b.safetensors", "--to", "peft")
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 3)}
    text |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3, 2)}
    text |= {"lora_unet_txt_in.lora_down.weight": torch.ones(2, 3), "lora_unet_txt_in.lora_up.weight": torch.ones(4, 2)}
    save_file(text, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="1 modules are not low-rank changes of an MMDiT's.*--partial"):
        run("convert", tmp_path / "text.safetensors", tmp_path / "c", "--to", "peft")
    run("convert", tmp_path / "text.safetensors", tmp_path / "c", "--to", "peft", "--partial")
    assert config(tmp_path / "c")["target_modules"] == ["txt_in"]
