"""LoRA adapters: the naming of all trainers comes to the same weights, what does not fit is refused and named."""

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.lora import LoraLinear, apply_loras, read_loras, split_lora
from opensora.models.build import build_on_meta
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tools.convert.layouts import DOUBLE_BLOCK, EMBEDDERS, SINGLE_BLOCK, convert_layout, from_diffusers

CASES = ROOT.parent / "shared" / "cases" / "lora"
SPLIT = MMDiTConfig.from_dict(
    dict(
        type="flux", in_channels=16, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2,
        depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False,
        fused_qkv=False, use_liger_rope=True,
    )
)  # fmt: skip
FUSED = replace(SPLIT, fused_qkv=True)


def mmdit(config: MMDiTConfig = SPLIT) -> MMDiTModel:
    """A model whose weights are random, the same ones in both QKV layouts."""
    torch.manual_seed(0)
    model = MMDiTModel(SPLIT).requires_grad_(False)
    if not config.fused_qkv:
        return model
    fused = MMDiTModel(config).requires_grad_(False)
    fused.load_state_dict(convert_layout(model.state_dict(), fused_qkv=True))
    return fused


def factors(names: list[str], model: MMDiTModel, rank: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random down and up projections for linear layers of a model."""
    generator = torch.Generator().manual_seed(1)
    layers = {name: model.get_submodule(name) for name in names}
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator),
            torch.randn(layer.out_features, rank, generator=generator),
        )
        for name, layer in layers.items()
    }


NAMES = [
    *("img_in", "double_blocks.1.img_mlp.0", "double_blocks.0.txt_attn.proj", "single_blocks.1.linear2"),
    *(f"double_blocks.0.img_attn.{part}_proj" for part in "qkv"),
    *("single_blocks.0.q_proj", "single_blocks.0.k_proj", "single_blocks.0.v_mlp", "single_blocks.0.modulation.lin"),
]
ALPHA = 6.0


def save(folder: Path, pairs, style: str, alpha: float | None = ALPHA) -> Path:
    """Write an adapter as a trainer would."""
    kinds = ("lora_down.weight", "lora_up.weight") if style == "kohya" else ("lora_A.weight", "lora_B.weight")
    prefix = {"peft": "base_model.model.", "default": "base_model.model.", "kohya": "lora_unet_"}.get(style, style)
    state = {}
    for name, pair in pairs.items():
        module = prefix + (name.replace(".", "_") if style == "kohya" else name)
        for kind, value in zip(kinds, pair):
            if style == "default":
                kind = kind.replace(".weight", ".default.weight")
            state[f"{module}.{kind}"] = value.contiguous()
        if style not in ("peft", "default") and alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(alpha)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("adapter_model.safetensors" if style in ("peft", "default") else "style.safetensors")
    save_file(state, file)
    if style in ("peft", "default"):
        write_config(folder, list(pairs), len(next(iter(pairs.values()))[0]), alpha)
        return folder
    return file


def write_config(folder: Path, targets, rank: int, alpha: float | None, **more) -> None:
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def applied(model: MMDiTModel, *entries: str | Path, merge: bool = True, partial: bool = False) -> MMDiTModel:
    return apply_loras(model, read_loras([str(entry) for entry in entries], model, partial), merge)


def assert_same(one: MMDiTModel, other: MMDiTModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-5)


def by_hand(pairs, scale: float, config: MMDiTConfig = SPLIT) -> MMDiTModel:
    model = mmdit(config)
    for name, (down, up) in pairs.items():
        model.get_submodule(name).weight.add_(scale * up @ down)
    return model


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(2), torch.arange(3), indexing="ij"), -1).float()
    return dict(
        img=torch.randn(1, 6, 16), img_ids=ids.reshape(1, 6, 3), txt=torch.randn(1, 4, 12),
        txt_ids=torch.zeros(1, 4, 3), timesteps=torch.tensor([0.5]), y_vec=torch.randn(1, 8),
    )  # fmt: skip


@pytest.mark.parametrize(
    "style", ["peft", "default", "kohya", "transformer.", "diffusion_model.", "base_model.model.transformer.", ""]
)
def test_every_naming_comes_to_the_same_weights(tmp_path, style):
    pairs = factors(NAMES, mmdit())
    path = save(tmp_path, pairs, style)
    assert_same(applied(mmdit(), f"{path}@0.5"), by_hand(pairs, 0.5 * ALPHA / 3))


def test_without_alpha_the_product_counts_once(tmp_path):
    pairs = factors(NAMES, mmdit())
    assert_same(applied(mmdit(), save(tmp_path, pairs, "transformer.", None)), by_hand(pairs, 1.0))


def test_alpha_and_rank_of_each_module(tmp_path):
    one, two = NAMES[:2]
    pairs = factors([one], mmdit(), 2) | factors([two], mmdit(), 5)
    expected = mmdit()
    for name, scale in ((one, 7 / 2), (two, 3 / 5)):
        down, up = pairs[name]
        expected.get_submodule(name).weight.add_(scale * up @ down)
    folder = save(tmp_path / "peft", pairs, "peft")
    write_config(folder, [one, two], 5, 3, rank_pattern={one: 2}, alpha_pattern={one: 7})
    assert_same(applied(mmdit(), folder), expected)
    file = save(tmp_path / "kohya", pairs, "kohya")
    state = load_file(file)
    state |= {f"lora_unet_{one}.alpha": torch.tensor(7.0)}
    state |= {f"lora_unet_{two.replace('.', '_')}.alpha": torch.tensor(3.0)}
    save_file(state, file)
    assert_same(applied(mmdit(), file), expected)
    write_config(folder, [one, two], 5, 3, rank_pattern={one: 2}, use_rslora=True)
    down, up = pairs[two]
    changed = applied(mmdit(), folder).get_submodule(two).weight - mmdit().get_submodule(two).weight
    torch.testing.assert_close(changed, 3 / 5**0.5 * up @ down, rtol=1e-4, atol=1e-5)


def test_alpha_that_the_file_records(tmp_path):
    pairs = factors(NAMES, mmdit())
    file = save(tmp_path, pairs, "transformer.", None)
    for facts in (
        {"ss_network_alpha": "6.0"},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 6})},
    ):
        save_file(load_file(file), file, facts)
        assert_same(applied(mmdit(), file), by_hand(pairs, 2.0))


@pytest.mark.parametrize("config", [SPLIT, FUSED])
@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_the_other_qkv_layout(tmp_path, config, style):
    """An adapter of a model with the other layout changes this one as it changed that."""
    theirs = FUSED if config is SPLIT else SPLIT
    fused = ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.qkv", "single_blocks.1.linear1", "txt_in"]
    pairs = factors(fused if theirs is FUSED else NAMES, mmdit(theirs))
    path = save(tmp_path, pairs, style)
    expected = by_hand(pairs, ALPHA / 3, theirs).state_dict()
    result = applied(mmdit(config), path).state_dict()
    for name, value in convert_layout(expected, fused_qkv=config.fused_qkv).items():
        torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("half_split", [True, False])
@pytest.mark.parametrize("style", ["transformer.", "peft", "kohya"])
def test_the_modules_of_diffusers(tmp_path, fused, half_split, style):
    """Applied before the conversion of a whole transformer or after it, an adapter does the same."""
    width, hidden = SPLIT.hidden_size, SPLIT.mlp_hidden
    ours = mmdit()

    def shape(prefix: str, name: str) -> tuple[int, int]:
        if name in ("v_proj", "proj_mlp") and prefix.startswith("single"):
            return (width if name == "v_proj" else hidden), width
        return tuple(ours.get_submodule(prefix + name).weight.shape)

    modules = {name: shape("", our) for name, our in EMBEDDERS.items() if "guidance" not in name}
    for i in range(2):
        for blocks, single, table in (("double", "", DOUBLE_BLOCK), ("single", "single_", SINGLE_BLOCK)):
            modules |= {
                f"{single}transformer_blocks.{i}.{name}": shape(f"{blocks}_blocks.{i}.", our)
                for name, our in table.items()
                if "norm_" not in name and "norm.query" not in our and "norm.key" not in our
            }
    generator = torch.Generator().manual_seed(2)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator) * 0.1

    weights = {f"{name}.weight": random(*size) for name, size in modules.items()}
    weights |= {f"{name}.bias": random(size[0]) for name, size in modules.items()}
    for i in range(2):
        scales = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]
        weights |= {f"transformer_blocks.{i}.attn.{name}.weight": random(SPLIT.head_dim) for name in scales}
        weights |= {f"single_transformer_blocks.{i}.attn.{name}.weight": random(SPLIT.head_dim) for name in scales[:2]}
    pairs = {name: (random(3, size[1]), random(size[0], 3)) for name, size in modules.items()}
    changed = {
        key: value + 2.0 * pairs[key.removesuffix(".weight")][1] @ pairs[key.removesuffix(".weight")][0]
        if key.removesuffix(".weight") in pairs and value.ndim == 2
        else value
        for key, value in weights.items()
    }

    def converted(state) -> MMDiTModel:
        model = MMDiTModel(replace(SPLIT, fused_qkv=fused, use_liger_rope=half_split)).requires_grad_(False)
        model.load_state_dict(
            convert_layout(from_diffusers(state), fused_qkv=fused, change_to_half_split=True if half_split else None)
        )
        return model

    assert_same(applied(converted(weights), save(tmp_path, pairs, style)), converted(changed))


@pytest.mark.parametrize("config", [SPLIT, FUSED])
def test_beside_the_weights_or_in_them(tmp_path, config):
    pairs = factors(NAMES, mmdit())
    styles = [save(tmp_path / "a", pairs, "peft"), f"{save(tmp_path / 'b', pairs, 'kohya')}@-0.3"]
    styles[0].joinpath("adapter_config.json").write_text(
        styles[0].joinpath("adapter_config.json").read_text().replace("6.0", "0.6")
    )
    merged, beside = (applied(mmdit(config), *styles, merge=merge) for merge in (True, False))
    module = "linear1" if config.fused_qkv else "v_mlp"
    assert isinstance(beside.get_submodule(f"single_blocks.0.{module}"), LoraLinear)
    results = [model(**inputs()) for model in (merged, beside, mmdit(config))]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_beside_bf16_weights_small_changes_are_kept(tmp_path):
    pairs = {name: (down * 1e-2, up * 1e-2) for name, (down, up) in factors(NAMES, mmdit()).items()}
    path = save(tmp_path, pairs, "peft")
    beside = applied(mmdit().bfloat16(), path, merge=False)
    assert beside.img_in.up.dtype == torch.float32
    x = torch.randn(1, 4, 16).bfloat16()
    assert beside.img_in(x).dtype == torch.bfloat16


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["txt_in"]}])
def test_what_peft_trains(tmp_path, more):
    """Variants that PEFT writes do here what they do there."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "linear2"], init_lora_weights=False, **more)
    tuned = peft.get_peft_model(mmdit(), settings)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_magnitude" in name or ("lora_B" in name and "bias" in name) or "modules_to_save" in name:
                value.add_(torch.randn_like(value).abs() * 0.3)
    tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tuned(**inputs())
    for merge in (True, False):
        result = applied(mmdit(), tmp_path, merge=merge)(**inputs())
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_whole_changes_of_comfyui(tmp_path):
    pairs = factors(NAMES[:1], mmdit())
    file = save(tmp_path, pairs, "diffusion_model.", None)
    weight, bias = torch.randn(32, 12), torch.randn(32)
    changes = {"diffusion_model.txt_in.diff": weight, "diffusion_model.txt_in.diff_b": bias}
    save_file(load_file(file) | changes, file)
    expected = by_hand(pairs, 0.5)
    expected.txt_in.weight.add_(0.5 * weight)
    expected.txt_in.bias.add_(0.5 * bias)
    assert_same(applied(mmdit(), f"{file}@0.5"), expected)


def change_file(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def lose(*ends: str):
    def change(state):
        for key in [key for key in state if any(end in key for end in ends)]:
            del state[key]

    return change


def odd_shape(state):
    key = "base_model.model.img_in.lora_A.weight"
    state[key] = state[key][:, :-1].contiguous()


BAD = {
    "half": (lose("single_blocks."), r"only in part \(6 modules\).*no tensors.*single_blocks\.1\.linear2"),
    "no up": (lose("img_in.lora_B"), r"without the up-projection \(lora_B\): base_model\.model\.img_in"),
    "shape": (odd_shape, r"of another shape: .*img_in \[3, 15\] and \[32, 3\] instead of \[3, 16\] and \[32, 3\]"),
    "other module": (
        lambda state: state.update({"text_encoder.layer.lora_A.weight": torch.ones(2, 2)}),
        r"not in the model: text_encoder\.layer",
    ),
    "kind": (
        lambda state: state.update({"base_model.model.txt_in.hada_w1_a": torch.ones(2, 2)}),
        r"LoHa without hada_w1_b.*: base_model\.model\.txt_in",
    ),
    "unknown": (
        lambda state: state.update({"base_model.model.txt_in.gone": torch.ones(2, 2)}),
        r"of an unknown kind: base_model\.model\.txt_in\.gone",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_fits_in_part_is_refused_and_named(tmp_path, case):
    change, said = BAD[case]
    pairs = factors(NAMES, mmdit())
    folder = save(tmp_path, pairs, "peft")
    change_file(folder / "adapter_model.safetensors", change)
    with torch.device("meta"):
        model = MMDiTModel(SPLIT)
    with pytest.raises(UserError, match=f"(?s){said}.*--lora-partial True"):
        read_loras(str(folder), model)
    (adapter,) = read_loras(str(folder), model, partial=True)
    assert 0 < len(adapter) <= len(NAMES)
    fitting = {name: pair for name, pair in pairs.items() if name in adapter.changes}
    assert_same(applied(mmdit(), folder, partial=True), by_hand(fitting, ALPHA / 3))


def test_of_another_model(tmp_path):
    torch.manual_seed(0)
    pairs = {f"blocks.{i}.self_attn.q": (torch.randn(2, 8), torch.randn(8, 2)) for i in range(3)}
    for style in ("peft", "kohya", "diffusion_model."):
        path = save(tmp_path / style, pairs, style)
        for partial in (False, True):
            with pytest.raises(UserError, match=r"fits no module of the model.*\n  not in the model: .*blocks"):
                read_loras(str(path), mmdit(), partial)
    wide = factors(NAMES, MMDiTModel(replace(SPLIT, hidden_size=64, axes_dim=[8, 12, 12])))
    with pytest.raises(UserError, match=r"(?s)fits no module .*another shape.*instead of"):
        read_loras(str(save(tmp_path / "wide", {n: p for n, p in wide.items() if n != "img_in"}, "peft")), mmdit())


def test_config_of_another_model(tmp_path):
    folder = save(tmp_path, factors(NAMES, mmdit()), "peft")
    write_config(folder, ["to_q", "to_k"], 3, 6)
    with pytest.raises(UserError, match=r"not among the target_modules of its config \(to_k, to_q\): .*\.q_proj, "):
        read_loras(str(folder), mmdit())
    write_config(folder, NAMES, 4, 6)
    with pytest.raises(UserError, match="of rank 3 where its config says 4"):
        read_loras(str(folder), mmdit())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"peft_type": "LOHA"}', "kind LOHA"),
        ('{"peft_type": "LORA", "use_qalora": true}', "use_qalora is set"),
        ('{"peft_type": "LORA", "lora_alpha": "x"}', "lora_alpha='x' is not a number"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha=nan is not a number"),
        ('{"peft_type": "LORA", "use_rslora": "no"}', "use_rslora='no' is neither true nor false"),
        ('{"peft_type": "LORA", "r": 3, "use_dora": true}', "without the magnitudes of DoRA"),
        ('{"peft_type": "LORA", "target_modules": 3}', "no config of an adapter"),
        ('{"peft_type": "LORA", "target_modules": "["}', "no config of an adapter"),
        ("[]", "no config of an adapter"),
        ("{", "no config of an adapter"),
    ],
)
def test_broken_configs(tmp_path, config, said):
    folder = save(tmp_path, factors(NAMES, mmdit()), "peft")
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=re.escape(said)):
        read_loras(str(folder), mmdit())


def test_broken_files(tmp_path):
    pairs = factors(NAMES, mmdit())
    file = save(tmp_path, pairs, "kohya")
    for value in (float("nan"), float("inf")):
        change_file(file, lambda state, value=value: state["lora_unet_img_in.lora_up.weight"].fill_(value))
        with pytest.raises(UserError, match=r"img_in\.lora_up\.weight is not finite"):
            read_loras(str(file), mmdit())
    file = save(tmp_path, pairs, "kohya", float("nan"))
    with pytest.raises(UserError, match=r"alpha is not finite"):
        read_loras(str(file), mmdit())
    save_file(mmdit().state_dict(), file)
    with pytest.raises(UserError, match="is no LoRA adapter: it holds an MMDiT"):
        read_loras(str(file), mmdit())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        read_loras(str(file), mmdit())
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="no adapter there"):
        read_loras(str(tmp_path / "notes.txt"), mmdit())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_down.weight": torch.zeros(0, 16), "lora_up.weight": torch.zeros(32, 0)}, "weight is empty, of shape"),
        ({"lora_down.weight": torch.zeros(16), "lora_up.weight": torch.zeros(32)}, r"of shape \[16\], not a matrix"),
        ({"diff": torch.tensor(1.0)}, r"of shape \[\], not a matrix"),
        ({"alpha": torch.tensor(True)}, "alpha must be one number"),
        ({"alpha": torch.tensor(1 + 1j)}, "alpha must be one number"),
        ({"alpha": torch.ones(2)}, "alpha must be one number"),
        ({"lora_up.weight": torch.ones(32, 3, dtype=torch.complex64)}, "holds complex64, not weights"),
        ({"lora_up.weight": torch.ones(32, 3, dtype=torch.bool)}, "holds bool, not weights"),
    ],
)
def test_tensors_that_no_trainer_writes(tmp_path, change, said):
    file = save(tmp_path, factors(NAMES, mmdit()), "kohya")
    state = load_file(file) | {f"lora_unet_img_in.{role}": value for role, value in change.items()}
    save_file(state, file)
    with pytest.raises(UserError, match=said):
        read_loras(str(file), mmdit())


def test_a_checkpoint_names_its_adapters(tmp_path):
    save(tmp_path / "lora", factors(NAMES, mmdit()), "peft")
    with pytest.raises(UserError, match=r"no adapter there .*did you mean .*/lora\?"):
        read_loras(str(tmp_path), mmdit())


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "x", ""])
def test_strengths_that_are_none(strength):
    with pytest.raises(UserError, match=f"style@{strength}.*(finite|not a) number"):
        split_lora(f"style@{strength}")


def test_a_strength_that_is_too_large(tmp_path):
    folder = save(tmp_path, factors(NAMES, mmdit()), "peft")
    with pytest.raises(UserError, match="not finite"):
        applied(mmdit(), f"{folder}@1e38")


def test_an_adapter_without_effect_is_told(tmp_path, caplog):
    pairs = {name: (down, up * 0) for name, (down, up) in factors(NAMES, mmdit()).items()}
    read_loras(str(save(tmp_path, pairs, "peft")), mmdit())
    assert "has no effect" in caplog.text


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not at hand")
def test_files_as_people_have_them(demo_model, tmp_path):
    (good,) = read_loras(str(CASES / "good"), demo_model)
    (prefixed,) = read_loras(str(CASES / "diffusers"), demo_model)
    assert good.changes.keys() == prefixed.changes.keys()
    assert len(good) == 32
    for name, change in good.changes.items():
        assert torch.equal(change.up @ change.down, prefixed.changes[name].up @ prefixed.changes[name].down)
    for name, said in (("half", "no tensors for modules"), ("targets", r"target_modules of its config \(to_k")):
        with pytest.raises(UserError, match=said):
            read_loras(str(CASES / name), demo_model)
    shutil.copy(CASES / "good/adapter_model.safetensors", tmp_path / "alone.safetensors")
    (alone,) = read_loras(str(tmp_path / "alone.safetensors"), demo_model)
    assert len(alone) == 32


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not at hand")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_of_fewer_bits(demo_model, tmp_path, kind):
    (good,) = read_loras(str(CASES / "good"), demo_model)
    state = load_file(CASES / "good/adapter_model.safetensors")
    few = {key: value.to(kind) for key, value in state.items()}
    few |= {f"{key.rsplit('.lora_', 1)[0]}.alpha": torch.tensor(16) for key in state}
    save_file(few, tmp_path / "few.safetensors")
    (found,) = read_loras(str(tmp_path / "few.safetensors"), demo_model)
    for name, change in good.changes.items():
        exact, near = change.up @ change.down, found.changes[name].up @ found.changes[name].down
        assert (near - exact).norm() < 0.15 * exact.norm()  # fp8 has two or three bits of fraction
    few[next(iter(state))].view(-1)[3] = float("nan")
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(UserError, match="is not finite"):
        read_loras(str(tmp_path / "few.safetensors"), demo_model)


@pytest.fixture
def demo_model():
    return build_on_meta(load_config(ROOT / "configs/diffusion/inference/demo.py", InferenceOptions, {}).model)


def lycoris(kind: str, name: str, model: MMDiTModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a module as LyCORIS writes them, and the change that they stand for, in float64."""
    generator = torch.Generator().manual_seed(3)
    height, width = model.get_submodule(name).weight.shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    if kind == "LoHa":
        parts = {"hada_w1_a": draw(height, 3), "hada_w1_b": draw(3, width)}
        parts |= {"hada_w2_a": draw(height, 3), "hada_w2_b": draw(3, width)}
        one, other = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
        return parts, one * other * ALPHA / 3
    left = (
        {"lokr_w1": draw(4, 2)}
        if kind != "LoKr of two products"
        else {"lokr_w1_a": draw(4, 2), "lokr_w1_b": draw(2, 2)}
    )
    right = {"lokr_w2": draw(height // 4, width // 2)}
    if kind != "LoKr of whole matrices":
        right = {"lokr_w2_a": draw(height // 4, 3), "lokr_w2_b": draw(3, width // 2)}
    one, other = (functools.reduce(torch.matmul, [each.double() for each in side.values()]) for side in (left, right))
    return left | right, torch.kron(one, other) * (1 if kind == "LoKr of whole matrices" else ALPHA / 3)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr of whole matrices", "LoKr of two products"])
@pytest.mark.parametrize("config", [SPLIT, FUSED], ids=["split", "fused"])
def test_products_of_lycoris(tmp_path, kind, config):
    """Against a computation in float64; the stored modules are those of the fused layout."""
    expected, state = mmdit(FUSED), {}
    for name in ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        parts, change = lycoris(kind, name, expected)
        state |= {f"lora_unet_{name.replace('.', '_')}.{part}": value for part, value in parts.items()}
        state[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(ALPHA)
        weight = expected.get_submodule(name).weight
        weight.copy_(weight.double() + 0.5 * change)
    save_file(state, tmp_path / "a.safetensors")
    found = applied(mmdit(config), f"{tmp_path / 'a.safetensors'}@0.5", merge=False)
    state_dict = expected.state_dict()
    if not config.fused_qkv:
        state_dict = convert_layout(state_dict, fused_qkv=False)
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, state_dict[key], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_scale(tmp_path, axis, merge):
    """Lengths of rows ([out, 1]) or of columns ([1, in]), against float64."""
    pairs = factors(NAMES, mmdit())
    file = save(tmp_path, pairs, "kohya")
    expected, state, generator = mmdit(), load_file(file), torch.Generator().manual_seed(2)
    for name, (down, up) in pairs.items():
        weight = expected.get_submodule(name).weight
        total = weight.double() + (ALPHA / 3 * up.double() @ down.double())
        lengths = total.norm(dim=1 - axis, keepdim=True)
        scale = torch.rand(lengths.shape, generator=generator) + 0.5
        weight.copy_(total / lengths * scale)
        state[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = scale
    save_file(state, file)
    found = applied(mmdit(), file, merge=merge)
    torch.testing.assert_close(found(**inputs()), expected(**inputs()), rtol=1e-4, atol=1e-4)
    if merge:
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("oft_blocks", "kind OFT"),
        ("lora_mid.weight", "LoCon, LoHa or LoKr of convolutions"),
        ("hada_t1", "of convolutions"),
        ("on_input", "IA3"),
        ("a1.weight", "GLoRA"),
        ("w_norm", "norms of LyCORIS"),
    ],
)
def test_other_kinds_are_named(tmp_path, tensor, said):
    save_file({f"lora_unet_img_in.{tensor}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"{said}.*merge it into the weights"):
        read_loras(str(tmp_path / "a.safetensors"), mmdit())


def test_products_that_are_damaged(tmp_path):
    parts, _ = lycoris("LoHa", "img_in", mmdit())
    for change, said in (
        (lambda state: state.pop("img_in.hada_w2_b"), "LoHa without hada_w2_b"),
        (lambda state: state.update({"img_in.hada_w2_b": torch.ones(3, 5)}), "do not fit one another"),
        (lambda state: state.update({"img_in.lokr_w1": torch.ones(3, 5)}), "LoHa with lokr_w1"),
        (lambda state: state.update({"img_in.dora_scale": torch.ones(32, 1)}), "DoRA of a LoHa"),
    ):
        state = {f"img_in.{part}": value for part, value in parts.items()}
        change(state)
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=said):
            read_loras(str(tmp_path / "a.safetensors"), mmdit())
