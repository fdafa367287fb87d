"""Adapters put on a loaded pipeline and taken off again."""

import pytest
import torch
from safetensors.torch import save_file

from opensora import VideoPipeline
from opensora.diffusion.lora import LoraLinear
from opensora.utils.errors import UserError


@pytest.fixture(scope="module")
def adapters(tiny_config, tmp_path_factory) -> list[str]:
    """Two that change the same layers and a bias, one that is not finite once it is added, one of another model."""
    model = VideoPipeline.from_config(tiny_config).models["model"]
    generator = torch.Generator().manual_seed(0)
    places = []
    for name, scale in (("a", 0.1), ("b", 0.2), ("large", 1e30), ("foreign", 0.1)):
        state = {}
        for module in ("img_in", "double_blocks.0.img_mlp.0"):
            layer = model.get_submodule(module)
            inner = layer.in_features + (name == "foreign")
            key = f"diffusion_model.{module}"
            state[f"{key}.lora_A.weight"] = scale * torch.randn(2, inner, generator=generator)
            state[f"{key}.lora_B.weight"] = scale * torch.randn(layer.out_features, 2, generator=generator)
        if name == "a":
            state["diffusion_model.img_in.diff_b"] = torch.ones(model.img_in.out_features)
        places.append(str(tmp_path_factory.mktemp("lora") / f"{name}.safetensors"))
        save_file(state, places[-1])
    return places


def state(pipe: VideoPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.models["model"].state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_and_off_again(tiny_config, adapters, merge, dtype):
    first, second = adapters[:2]
    pipe = VideoPipeline.from_config(tiny_config, merge_lora=merge, dtype=dtype)
    plain = state(pipe)
    pipe.load_lora(first, strength=0.5)
    pipe.load_lora(second)
    from_config = VideoPipeline.from_config(
        tiny_config, merge_lora=merge, dtype=dtype, pretrained_lora_path=[f"{first}@0.5", second]
    )
    assert same(state(pipe), state(from_config))
    assert [tuple(each) for each in pipe.loras] == [(first, 0.5), (second, 1.0)]
    assert any(isinstance(module, LoraLinear) for module in pipe.models["model"].modules()) is not merge
    pipe.unload_lora(first)
    assert same(
        state(pipe),
        state(VideoPipeline.from_config(tiny_config, merge_lora=merge, dtype=dtype, pretrained_lora_path=second)),
    )
    pipe.unload_lora()
    assert same(state(pipe), plain)
    assert pipe.loras == ()


@pytest.mark.parametrize("merge", [True, False])
def test_what_cannot_be_loaded_changes_nothing(tiny_config, adapters, merge, tmp_path):
    first, _, large, foreign = adapters
    pipe = VideoPipeline.from_config(tiny_config, merge_lora=merge)
    pipe.load_lora(first)
    before = state(pipe)
    wrong = [
        (foreign, 1.0, "fits no module"),
        (str(tmp_path), 1.0, "no adapter there"),
        (first, float("nan"), "finite"),
    ]
    for path, strength, said in [*wrong, *([(large, 1.0, "not finite")] if merge else [])]:
        with pytest.raises(UserError, match=said):
            pipe.load_lora(path, strength)
        assert same(state(pipe), before)
        assert [each.path for each in pipe.loras] == [first]
    with pytest.raises(UserError, match="unload_lora: gone is not loaded; loaded: .*a.safetensors"):
        pipe.unload_lora("gone")


def test_without_any(tiny_config, adapters):
    pipe = VideoPipeline.from_config(tiny_config)
    pipe.unload_lora()
    with pytest.raises(UserError, match="gone is not loaded; loaded: none"):
        pipe.unload_lora("gone")
    beside = VideoPipeline.from_config(tiny_config, merge_lora=False, pretrained_lora_path=adapters[0])
    with pytest.raises(UserError, match="lie beside the weights"):
        beside.load_lora(adapters[1])


def test_beside_quantised_weights(tiny_config, adapters):
    model = {**tiny_config["model"], "quantize": "int8"}
    pipe = VideoPipeline.from_config({**tiny_config, "model": model}, num_steps=1)
    plain = state(pipe)
    pipe.load_lora(adapters[0])
    assert isinstance(pipe.models["model"].double_blocks[0].img_mlp[0], LoraLinear)
    pipe("a", seed=1)
    pipe.unload_lora()
    assert same(state(pipe), plain)


def test_it_shows_in_the_video(tiny_config, adapters):
    pipe = VideoPipeline.from_config(tiny_config, num_steps=1)
    plain = pipe("a", seed=1).latents
    pipe.load_lora(adapters[1], strength=5)
    changed = pipe("a", seed=1).latents
    pipe.to(torch.float64).to(torch.float32).unload_lora()
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(pipe("a", seed=1).latents, plain)
