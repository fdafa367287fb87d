"""Quantised weights: as exact as their kind allows, a tensor at a time, the same from a file as while loading."""

import copy
import importlib.util
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from opensora.config.choices import QUANTIZERS
from opensora.diffusion.offload import on_device
from opensora.models.build import build_on_meta, check_weights
from opensora.models.mmdit import MMDiTConfig
from opensora.models.mmdit.loading import layout_metadata, quantization
from opensora.models.quantization.fp8 import Fp8
from opensora.models.quantization.linear import QuantizedLinear
from opensora.models.text.config import TextEmbedderConfig
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.weights import WeightFiles, open_weights
from opensora.utils.weights_writing import save_safetensors
from tests.conftest import ROOT
from tests.integration.own_package import page_files
from tests.unit.models.test_mmdit_loading import CONFIG
from tools.convert import mmdit, quantize

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(missing, reason="bitsandbytes is not installed"))
    for kind, missing in (("fp8", False), ("int8", False), ("nf4", importlib.util.find_spec("bitsandbytes") is None))
]
# Relative error of normal weights: half a step of uniform numbers, in a row whose largest is about 3.3 sigma, is
# 3.3 / 127 / sqrt(12) = 0.75 %; e4m3 has 3 bits after the leading one, 2^-4 / sqrt(3) at most, 2.6 % on average; nf4's
# 16 values are 9 % off (QLoRA, appendix E). A tenth is added for the spread of a few thousand weights.
ERRORS = {"int8": 0.0085, "fp8": 0.029, "nf4": 0.1}
T5 = ROOT / "assets" / "demo" / "google" / "t5-demo"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights of a small MMDiT as a file."""
    torch.manual_seed(0)
    model = build_module({**CONFIG}, MODELS)
    path = tmp_path_factory.mktemp("quantized") / "model.safetensors"
    save_safetensors(model.state_dict(), path, layout_metadata(model.config))
    return path


def build(source, **keys):
    dtype = keys.pop("torch_dtype", torch.float32)
    return build_module({**CONFIG, "from_pretrained": source and str(source), **keys}, MODELS, torch_dtype=dtype)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_as_close_as_the_kind_allows(kind):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0  # a row of zeros stays one
    quantizer = QUANTIZERS.get(kind)()
    parts = quantizer.pack(weight)
    assert {name: (tuple(p.shape), p.dtype) for name, p in parts.items()} == quantizer.layout(*weight.shape)
    back = quantizer.unpack(parts, torch.float32)
    assert (back - weight).norm() / weight.norm() < ERRORS[kind]
    assert not back[3].any()
    for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float64, 1e-6)):
        assert torch.allclose(quantizer.unpack(parts, dtype).float(), back, rtol=rounding, atol=1e-7)


def test_int8_and_fp8_take_any_range():
    for kind in ("int8", "fp8"):
        quantizer = QUANTIZERS.get(kind)()
        for size in (1e-20, 1e20):
            weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * size
            back = quantizer.unpack(quantizer.pack(weight), torch.float32)
            assert (back - weight).abs().max() < 0.04 * weight.abs().max()


def test_fp8_product_equals_that_of_the_unpacked_numbers():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(2, 5, 64, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16()
    quantizer = Fp8()
    parts = quantizer.pack(weight)
    tokens, scale = quantizer.rows(x.float(), x.float().abs().amax(-1, keepdim=True) / quantizer.most)
    expected = tokens.float() * scale @ quantizer.unpack(parts, torch.float32).t() + bias.float()
    found = quantizer.product(x, parts, bias)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 2**-8  # sums in fp32, the result rounded to bf16
    exact = x.float() @ weight.t() + bias.float()
    # tokens and weights are each 2.6 % off, which adds up as squares do
    assert (found.float() - exact).norm() / exact.norm() < 2**0.5 * ERRORS["fp8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_only_the_linear_layers_of_blocks_are_quantised(source, kind, fused):
    model = build(None, quantize=kind, fused_qkv=fused)
    wanted = {
        name
        for name, module in build(None, fused_qkv=fused).named_modules()
        if isinstance(module, nn.Linear) and name.split("_")[0] in ("double", "single") and "mod" not in name
    }
    assert quantized_layers(model).keys() == wanted
    assert len(wanted) == (12 if fused else 20)  # 1 double block, 2 single blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_quantised_weights_is_the_same_as_quantising_while_loading(source, kind, tmp_path):
    while_loading = build(source, quantize=kind, torch_dtype=torch.bfloat16).state_dict()
    quantize.main([str(source), str(tmp_path / "q.safetensors"), kind])
    for keys in ({}, {"quantize": kind}):
        from_file = build(tmp_path / "q.safetensors", torch_dtype=torch.bfloat16, **keys).state_dict()
        assert from_file.keys() == while_loading.keys()
        for key, value in while_loading.items():
            assert from_file[key].dtype == value.dtype
            assert torch.equal(from_file[key].float(), value.float()), key
    fp32 = ["--dtype", "fp32", "--overwrite"]  # of all that is not quantised
    quantize.main([str(source), str(tmp_path / "q.safetensors"), kind, *fp32])
    in_bf16 = build(tmp_path / "q.safetensors", torch_dtype=torch.bfloat16).state_dict()
    assert {key: value.dtype for key, value in in_bf16.items()} == {k: v.dtype for k, v in while_loading.items()}
    stored = open_weights(tmp_path / "q.safetensors")
    assert stored.metadata["quantize"] == kind
    assert stored.metadata["use_liger_rope"] == "True"


def test_a_kind_of_the_users_own(source, tmp_path, monkeypatch):
    monkeypatch.setattr(QUANTIZERS, "_added", {})
    exec(page_files()["my_package/quantizer.py"], {"__name__": "my_package.quantizer"})
    quantize.main([str(source), str(tmp_path / "q.safetensors"), "int8_columns", "--dtype", "fp32"])
    loaded = build(tmp_path / "q.safetensors")
    exact, found = (model.single_blocks[1].linear2.weight for model in (build(source), loaded))
    assert 0 < (found - exact).norm() / exact.norm() < ERRORS["int8"]


@pytest.mark.parametrize("kind", KINDS)
def test_while_loading_there_is_one_full_weight_at_a_time(source, kind, monkeypatch):
    """Of the weights that are quantised, none that was read before is there when the next one is."""
    covered, alive, most = quantization().covers, [], []
    plain = WeightFiles.tensors

    def watched(self, *args, **keys):
        for key, tensor in plain(self, *args, **keys):
            held = tensor.clone()  # not a view of the file, which would count as the file's
            del tensor
            if covered(key.rpartition(".")[0]) and held.ndim == 2:
                most.append(sum(size for ref, size in alive if ref() is not None) + held.nbytes)
                alive.append((weakref.ref(held), held.nbytes))
            yield key, held
            del held

    monkeypatch.setattr(WeightFiles, "tensors", watched)
    model = build(source, quantize=kind)
    sizes = [size for _, size in alive]
    assert len(sizes) == 20
    assert max(most) <= 2 * max(sizes)  # what is read, and at most the one before, which the generator lets go
    assert all(ref() is None for ref, _ in alive)
    stays = sum(p.nbytes for layer in quantized_layers(model).values() for p in layer.parts.values())
    assert stays < {"int8": 0.3, "fp8": 0.3, "nf4": 0.14}[kind] * sum(sizes)  # of fp32; scales of rows of 32 count


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_inputs_as_through_the_unpacked_weight(kind):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(32, 48)
    layer = QuantizedLinear(plain, QUANTIZERS.get(kind)(), torch.float32).take(plain.weight)
    layer.bias = nn.Parameter(plain.bias.detach().clone())
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x = torch.randn(2, 3, 32, generator=generator, requires_grad=True)
    up = torch.randn(2, 3, 48, generator=generator)
    found = torch.autograd.grad(layer(x), [x, layer.bias], up)
    expected = torch.autograd.grad(plain(x), [x, plain.bias], up)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # the same products, in another order
    assert torch.autograd.grad(layer(x.detach()), layer.bias, up)[0].allclose(expected[1], atol=1e-6)
    assert not any(part.requires_grad for part in layer.parts.values())
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("kind", KINDS[::2])  # int8 and fp8 unpack alike
def test_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    plain = nn.Linear(32, 48)
    layer = QuantizedLinear(plain, QUANTIZERS.get(kind)(), torch.float32).take(plain.weight).requires_grad_(False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    x.requires_grad_()
    assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, layer)))
    torch._dynamo.reset()


def test_moving_and_casting_leave_the_numbers(source):
    model = build(source, quantize="fp8")
    before = {name: copy.deepcopy(layer.parts) for name, layer in quantized_layers(model).items()}
    model.bfloat16()
    for name, layer in quantized_layers(model).items():
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
        for part, value in before[name].items():
            assert getattr(layer, part).dtype == value.dtype
            assert torch.equal(getattr(layer, part).float(), value.float())
    assert model.float().single_blocks[0].linear2.weight.dtype == torch.float32
    assert model.to("meta").single_blocks[0].linear2.qweight.is_meta


def test_offload_copies_them_as_they_are(source):
    model = build(source, quantize="int8").requires_grad_(False)
    layer = model.single_blocks[0].linear2
    before = layer.qweight
    with on_device(model, torch.device("meta"), offload=True):
        assert layer.qweight.is_meta
        assert (layer.qweight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    assert layer.qweight is before


def test_a_peft_adapter_trains_beside_quantised_weights(source):
    from peft import LoraConfig, inject_adapter_in_model

    model = build(source, quantize="int8").requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj", "linear2"], use_dora=False), model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (2 + 2)
    layer = model.single_blocks[0].linear2
    x = torch.randn(1, 3, layer.in_features)
    layer(x).square().sum().backward()
    assert layer.lora_B["default"].weight.grad.any()
    assert layer.base_layer.qweight.grad is None


# -------------------------------------------------------------------------------------------------- text encoder


@pytest.fixture(scope="module")
def texts():
    if not (T5 / "model.safetensors").is_file():
        pytest.skip(f"{T5} is not at hand")
    return ["a red circle moves to the right", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_t5_while_loading_and_from_a_folder(texts, kind, tmp_path):
    section = {"type": "text_embedder", "from_pretrained": str(T5), "max_length": 12}
    plain = build_module(section, MODELS)
    while_loading = build_module({**section, "quantize": kind}, MODELS)
    assert len(quantized_layers(while_loading)) > 0
    assert plain.model.shared.weight.equal(while_loading.model.encoder.embed_tokens.weight)
    exact, found = plain(texts), while_loading(texts)
    assert (found - exact).norm() / exact.norm() < 3 * ERRORS[kind]  # layers add their errors up
    quantize.main([str(T5), str(tmp_path / "t5"), kind, "--dtype", "fp32"])
    check_weights("t5", TextEmbedderConfig(type="text_embedder", from_pretrained=str(tmp_path / "t5")))
    from_file = build_module({**section, "from_pretrained": str(tmp_path / "t5")}, MODELS)
    assert torch.equal(from_file(texts), found)


# --------------------------------------------------------------------------------------------------- what is refused


def config(**keys) -> MMDiTConfig:
    return replace(MMDiTConfig.from_dict({**CONFIG, **keys}), type="flux")


def test_a_file_of_another_kind_than_the_config_says(source, tmp_path):
    path = tmp_path / "q.safetensors"
    quantize.main([str(source), str(path), "int8"])
    for check in (lambda c: check_weights("model", c), lambda c: build_module(c, MODELS)):
        with pytest.raises(UserError, match=r"model\.quantize=fp8, but the weights in .* are quantised as int8: leave"):
            check(config(from_pretrained=str(path), quantize="fp8"))
    check_weights("model", config(from_pretrained=str(path)))
    with pytest.raises(UserError, match=r"set model\.depth=1"):
        check_weights("model", config(from_pretrained=str(path), depth=2))
    with pytest.raises(UserError, match=r"split QKV projections .*: set model\.fused_qkv=False"):
        check_weights("model", config(from_pretrained=str(path), fused_qkv=True))
    for convert, how in ((quantize.main, ["fp8"]), (mmdit.main, ["--qkv", "fused"])):
        with pytest.raises(UserError, match="its weights are quantised"):
            convert([str(path), str(tmp_path / "twice.safetensors"), *how])
    save_safetensors({"img_in.weight": torch.zeros(1)}, path, {"quantize": "q9"})
    with pytest.raises(UserError, match=r"q9.*unknown kind.*fp8, int8, nf4"):
        check_weights("model", config(from_pretrained=str(path)))


def test_an_unknown_kind():
    with pytest.raises(UserError, match="int4: expected one of fp8, int8, nf4"):
        config(quantize="int4")


def test_a_missing_package_is_named_before_anything_is_loaded(source, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for path in (str(source), None):
        with pytest.raises(UserError, match=r"model\.quantize=nf4 needs the module bitsandbytes.*pip install"):
            check_weights("model", config(from_pretrained=path, quantize="nf4"))
    check_weights("model", config(from_pretrained=str(source), quantize="int8"))


def test_clip_is_not_quantised():
    clip = ROOT / "assets" / "demo" / "openai" / "clip-demo"
    section = TextEmbedderConfig(type="text_embedder", from_pretrained=str(clip), max_length=77, quantize="int8")
    with pytest.raises(UserError, match=r"clip\.quantize=int8: only T5"):
        check_weights("clip", section)


def test_the_tool_refuses_what_it_cannot_quantise(source, tmp_path):
    with pytest.raises(UserError, match="unknown kind of quantised weights 'int9'"):
        quantize.main([str(source), str(tmp_path / "q.safetensors"), "int9"])
    with pytest.raises(UserError, match="can be quantised"):
        quantize.main([str(ROOT / "assets" / "demo" / "vae.safetensors"), str(tmp_path / "q.safetensors"), "int8"])
    shutil.copytree(T5, tmp_path / "t5")
    with pytest.raises(UserError, match="is the source"):
        quantize.main([str(tmp_path / "t5"), str(tmp_path / "t5"), "int8", "--overwrite"])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_model_on_meta_is_whole_and_counts_the_bytes_of_its_quantised_weights():
    section = config(quantize="nf4", hidden_size=64, num_heads=4)
    model = build_on_meta(section)
    assert not quantized_layers(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    kept, parts = quantization("nf4").layout(shapes)
    built = build_module(config(quantize="nf4", hidden_size=64, num_heads=4), MODELS)
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == {
        **kept,
        **{name: part.shape for name, part in parts.items()},
    }
    assert sum(part.nbytes for part in parts.values()) == sum(
        p.nbytes for layer in quantized_layers(built).values() for p in layer.parts.values()
    )
