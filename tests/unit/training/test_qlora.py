"""Adapters on quantised weights: beside those on plain ones; what is held; how adapters compute."""

import copy

import pytest
import torch

from opensora.acceleration.placing import bytes_of
from opensora.models.mmdit.loading import quantization
from opensora.models.quantization.linear import QuantizedLinear
from opensora.training.weights.adapters import LoraAdapter, TrainedWeights
from opensora.training.weights.masters import MasterWeights
from tests.parallel.tiny import loss_of, tiny_inputs, tiny_model

KINDS = ("fp8", "int8", "nf4")
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_mlp", "linear2"], init_lora_weights=False)


def adapted(kind=None, dtype=torch.float32, **more):
    """A tiny model with an adapter, quantised or of the weights that stands for; the same adapter for all."""
    model = tiny_model(dtype).train()
    if kind is not None:
        quantization(kind).replace_filled(model)
    torch.manual_seed(3)
    return model, LoraAdapter(model, {**LORA, **more})


def dequantised(model):
    """The same model with plain weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features)
            plain.weight = torch.nn.Parameter(module.weight, requires_grad=False)
            plain.bias = module.bias
            twin.set_submodule(name, plain)
    return twin


def gradients(model, recomputed=False):
    model.set_grad_checkpoint(recomputed)
    loss = loss_of(model, tiny_inputs(dtype=model.dtype))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_loss_and_gradients_are_those_on_the_weights_that_it_stands_for(kind, dora):
    model, _ = adapted(kind, use_dora=dora)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) > 10
    loss, found = gradients(model, recomputed=True)
    other_loss, expected = gradients(dequantised(model))
    assert torch.equal(loss, other_loss)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    assert any("magnitude" in name for name in found) == dora
    for name, value in found.items():  # a product is taken in another order than autograd's
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "share"), [("fp8", 0.75), ("int8", 0.75), ("nf4", 0.62)])
def test_bytes_that_are_held(kind, share):
    """Frozen weights take the room of their kind, and nothing is in fp32; modulation stays in bf16."""
    sizes = {"hidden_size": 64, "context_in_dim": 64, "num_heads": 4, "axes_dim": [8, 4, 4]}
    plain = tiny_model(torch.bfloat16, **sizes)
    model = tiny_model(torch.bfloat16, **sizes)
    quantization(kind).replace_filled(model)
    before = bytes_of(model)
    assert before < share * bytes_of(plain)
    LoraAdapter(model, LORA)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert bytes_of(model) == before + 4 * trained
    masters = MasterWeights(model, torch.bfloat16)
    assert bytes_of(model) == before + 2 * trained
    assert sum(value.numel() for value in masters.state_dict().values()) == trained


def test_adapters_in_bf16_keep_copies_that_are_saved():
    model, adapter = adapted("int8", torch.bfloat16)
    exact = {name: value.clone() for name, value in adapter.state_dict().items()}
    weights = TrainedWeights(model, MasterWeights(model, torch.bfloat16), adapter)
    saved = weights.saved()
    assert saved.keys() == exact.keys()
    assert all(torch.equal(saved[name], exact[name]) for name in exact)
    held = adapter.state_dict()
    assert all(torch.equal(held[name], exact[name].bfloat16()) for name in exact)
    before = weights.show({name: torch.zeros_like(value) for name, value in saved.items()})
    assert not any(value.any() for value in adapter.state_dict().values())
    weights.show(before)
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in adapter.state_dict().items())
    gradients(model)
    assert all(master.grad is not None and master.grad.dtype == torch.float32
               for _, master in weights.masters.named_parameters())  # fmt: skip
