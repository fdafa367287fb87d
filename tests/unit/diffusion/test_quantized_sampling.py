"""Videos with quantised weights: adapters, offload, plan and record know of them; what cannot be is refused early."""

import json

import pytest
import torch
from safetensors.torch import save_file

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.loading import load_models
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun, check_parallelism
from opensora.generation.outputs import weight_records
from opensora.generation.room import Needs, parameter_counts
from opensora.models.build import build_ready
from opensora.models.quantization.linear import QuantizedLinear
from opensora.models.quantization.loading import quantize_tensors
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors
from tools.convert import quantize

CPU = torch.device("cpu")
BLOCKS, MODULATION = "double_blocks.0.img_attn.proj", "single_blocks.0.modulation.lin"


@pytest.fixture(scope="module")
def weights(tiny_config, tmp_path_factory):
    """The tiny model as a file, an adapter of it, and the file with int8 weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = build_ready(load_config(tiny_config, InferenceOptions).model, CPU, torch.float32)
    save_safetensors(model.state_dict(), folder / "model.safetensors", model.file_metadata())
    state = {}
    for name in (BLOCKS, MODULATION):
        layer = model.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
        state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
    save_file(state, folder / "adapter.safetensors")
    save_file({k: v for k, v in state.items() if MODULATION in k}, folder / "modulation.safetensors")
    quantize.main([str(folder / "model.safetensors"), str(folder / "int8.safetensors"), "int8", "--dtype", "fp32"])
    return folder


def prepare(content, weights, file="model", **overrides) -> PreparedRun:
    overrides = {"model.from_pretrained": str(weights / f"{file}.safetensors"), **overrides}
    return PreparedRun.of(load_config({**content, "prompt": "a"}, InferenceOptions, overrides), CPU)


def test_adapters_are_merged_before_weights_are_quantised(tiny_config, weights):
    overrides = {"pretrained_lora_path": str(weights / "adapter.safetensors@0.5")}
    plain = prepare(tiny_config, weights, **overrides)
    merged = load_models(plain)["model"].state_dict()
    run = prepare(tiny_config, weights, **overrides, **{"model.quantize": "int8"})
    model = load_models(run)["model"]
    layer = model.get_submodule(BLOCKS)
    assert isinstance(layer, QuantizedLinear)
    for name, value in quantize_tensors(merged.items(), lambda name: name == BLOCKS, layer.quantizer):
        if name.startswith((BLOCKS, MODULATION)):
            assert torch.equal(model.state_dict()[name], value), name


def test_adapters_beside_quantised_weights(tiny_config, weights):
    overrides = {"pretrained_lora_path": str(weights / "adapter.safetensors"), "merge_lora": False}
    run = prepare(tiny_config, weights, **overrides, **{"model.quantize": "int8"})
    model = load_models(run)["model"]
    bare = load_models(prepare(tiny_config, weights, **{"model.quantize": "int8"}))["model"]
    x = torch.randn(2, 3, 32)
    (adapter,) = run.adapters(run.model)
    change = adapter.changes[BLOCKS]
    expected = bare.get_submodule(BLOCKS)(x) + x @ change.down.t() @ change.up.t()
    assert torch.allclose(model.get_submodule(BLOCKS)(x), expected, rtol=1e-5, atol=1e-5)  # one more rounding
    stored = load_models(prepare(tiny_config, weights, "int8", **overrides))["model"]
    assert torch.equal(stored.get_submodule(BLOCKS)(x), model.get_submodule(BLOCKS)(x))


def test_an_adapter_cannot_change_weights_that_a_file_holds_quantised(tiny_config, weights):
    for keys in ({}, {"model.quantize": "int8"}):
        run = prepare(tiny_config, weights, "int8", pretrained_lora_path=str(weights / "adapter.safetensors"), **keys)
        with pytest.raises(UserError, match=rf"it changes {BLOCKS}, whose .* quantised in .*--merge-lora False"):
            run.check_resources()
    run = prepare(tiny_config, weights, "int8", pretrained_lora_path=str(weights / "modulation.safetensors"))
    run.check_resources()
    merged = load_models(prepare(tiny_config, weights, pretrained_lora_path=run.cfg.pretrained_lora_path))["model"]
    assert torch.equal(
        load_models(run)["model"].get_submodule(MODULATION).weight, merged.get_submodule(MODULATION).weight
    )


def test_videos_come_close_and_do_not_depend_on_where_weights_come_from(tiny_config, weights, caplog):
    caplog.set_level("INFO")
    latents = {}
    for name, keys in {
        "exact": {},
        "int8": {"model.quantize": "int8", "t5.quantize": "int8"},
        "int8, offload": {"model.quantize": "int8", "t5.quantize": "int8", "offload": True},
        "int8, file": {"model.from_pretrained": str(weights / "int8.safetensors"), "t5.quantize": "int8"},
    }.items():
        run = prepare(tiny_config, weights, num_steps=2, **keys)
        run.check_resources()
        latents[name] = VideoPipeline.from_prepared(run)("a", seed=1).latents
    assert torch.equal(latents["int8"], latents["int8, offload"])
    assert torch.equal(latents["int8"], latents["int8, file"])
    error = (latents["int8"] - latents["exact"]).norm() / latents["exact"].norm()
    assert 0 < error < 0.05  # of 0.8 % in every layer
    assert "model: approximate, the weights of" in caplog.text
    assert "t5: approximate, the weights of" in caplog.text


def test_plan_and_record_name_them(tiny_config, weights, tmp_path):
    exact, int8 = (prepare(tiny_config, weights, **keys) for keys in ({}, {"model.quantize": "int8"}))
    stored = prepare(tiny_config, weights, "int8")
    assert parameter_counts(exact)[0] == parameter_counts(int8)[0] == parameter_counts(stored)[0]
    needs = [Needs.of(run, [run.plan], 1).weights for run in (exact, int8, stored)]
    loaded = [sum(p.nbytes for p in load_models(run)["model"].parameters()) for run in (exact, int8)]
    assert needs[1] == needs[2]
    assert needs[0] - needs[1] == loaded[0] - loaded[1] > 0
    for run in (int8, stored):
        record = weight_records(run.cfg)
        assert (record["model"]["quantize"], record["model"]["approximate"]) == ("int8", True)
        assert "quantize" not in record["t5"]
        json.dumps(record)
    quantize.main([tiny_config["t5"]["from_pretrained"], str(tmp_path / "t5"), "fp8"])
    t5 = prepare(tiny_config, weights, **{"t5.from_pretrained": str(tmp_path / "t5")})
    assert parameter_counts(t5)[0]["t5"] == parameter_counts(exact)[0]["t5"]
    assert Needs.of(t5, [t5.plan], 1).weights < needs[0]


def test_a_dry_run_says_so(run_tiny, capsys):
    run_tiny("--prompt", "a", "--dry-run", "True", "--t5.quantize", "int8", "--model.quantize", "fp8")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines if "quantised to" in line] == [
        ["to", "fp8:", "approximate"],
        ["to", "int8:", "approximate"],
    ]
    with pytest.raises(UserError, match="--model.quantize int7: expected one of fp8, int8, nf4"):
        run_tiny("--prompt", "a", "--dry-run", "True", "--model.quantize", "int7")


def test_tensor_parallelism_is_refused(tiny_config, weights):
    for file, keys in (("model", {"model.quantize": "int8"}), ("int8", {})):
        run = prepare(tiny_config, weights, file, plugin="hybrid", **{"plugin_config.tp_size": 2}, **keys)
        with pytest.raises(UserError, match=r"tp_size=2: quantised weights \(int8\) are not divided; use sp_size"):
            check_parallelism(run.cfg, run.model, 2)
    run = prepare(tiny_config, weights, plugin="hybrid", **{"plugin_config.sp_size": 2, "model.quantize": "int8"})
    check_parallelism(run.cfg, run.model, 2)
