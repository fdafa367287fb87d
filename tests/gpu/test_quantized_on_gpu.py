"""Quantised weights on a GPU: the same numbers as on the CPU, and fp8 products as exact as their numbers."""

import importlib.util

import pytest
import torch
from torch import nn

from opensora.config.choices import QUANTIZERS
from opensora.models.quantization.fp8 import Fp8, multiplies_fp8
from opensora.models.quantization.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda", 0)
KINDS = [
    "fp8",
    "int8",
    pytest.param(
        "nf4",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
        ),
    ),
]


def layer_of(kind: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    torch.manual_seed(0)
    plain = nn.Linear(512, 768)
    layer = QuantizedLinear(plain, QUANTIZERS.get(kind)(), torch.float32).take(plain.weight)
    return layer.requires_grad_(False).to(device, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_cpu(kind):
    quantizer, weight = QUANTIZERS.get(kind)(), torch.randn(768, 512, generator=torch.Generator().manual_seed(0))
    there, here = (quantizer.unpack(quantizer.pack(weight.to(place)), torch.float32).cpu() for place in (GPU, "cpu"))
    off = (there != here).float().mean()
    assert off < 1e-3, "weights halfway between two values may go to either"
    assert (there - weight).norm() == pytest.approx(float((here - weight).norm()), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_it_does_on_the_cpu(kind):
    x = torch.randn(3, 100, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        there, here = layer_of(kind, GPU)(x.to(GPU)).cpu().float(), layer_of(kind, torch.device("cpu"))(x).float()
    # bf16 results; with products of fp8 numbers, activations are 2.6 % off
    assert (there - here).norm() / here.norm() < (0.03 if kind == "fp8" and multiplies_fp8(GPU) else 0.005)


def test_fp8_products_equal_those_of_the_unpacked_numbers():
    if not multiplies_fp8(GPU):
        pytest.skip("this GPU has no products of fp8 numbers")
    layer, quantizer = layer_of("fp8", GPU), Fp8()
    x = torch.randn(100, 512, device=GPU, dtype=torch.bfloat16)
    tokens, scale = quantizer.rows(x.float(), x.float().abs().amax(-1, keepdim=True) / quantizer.most)
    expected = tokens.float() * scale @ quantizer.unpack(layer.parts, torch.float32).t() + layer.bias.float()
    with torch.no_grad():
        found = layer(x).float()
    assert (found - expected).norm() / expected.norm() < 0.01  # fast accumulation keeps 14 bits of a sum


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_backward(kind):
    torch._dynamo.reset()
    layer = layer_of(kind, GPU)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(64, 512, device=GPU, dtype=torch.bfloat16)
    with torch.no_grad():
        one, other = compiled(x).float(), layer(x).float()
    assert (one - other).norm() / other.norm() < 0.01  # rounded elsewhere
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    expected = torch.ones(64, 768, device=GPU) @ layer.weight.float()
    assert (grad.float() - expected).norm() / expected.norm() < 0.01
