"""Group normalisation for GPUs is that of torch, in whatever precision; it runs on the CPU here."""

import pytest
import torch
from torch import nn

from opensora.models.vae.group_norm import group_norm, spread_group_norm


def affine_norm(channels: int = 8, groups: int = 4) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def spread(norm, x):
    return spread_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("shape", [(2, 8, 5, 6, 7), (1, 8, 1, 3, 3), (2, 8, 6, 7), (3, 8, 50), (1, 8, 1, 1, 1)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_it_is_torchs_own(shape, mean):
    torch.manual_seed(0)
    norm = affine_norm()
    x = torch.randn(shape) * 2 + mean
    # float32 at 30: of values of 30 +- 2, rounding keeps 1e-6
    torch.testing.assert_close(spread(norm, x), norm(x), atol=1e-4 if mean else 1e-5, rtol=1e-5)
    torch.testing.assert_close(spread(norm.double(), x.double()), norm(x.double()), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_16_bits_are_summed_in_32(dtype, mean):
    torch.manual_seed(0)
    norm = affine_norm()
    x = (torch.randn(2, 8, 9, 40, 30) * 2 + mean).to(dtype)
    exact = norm.double()(x.double())
    out = spread(norm.to(dtype), x)
    assert out.dtype == dtype
    # one rounding of the result, and those of weight and bias
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=4 * eps, rtol=2 * eps)


def test_equal_values_are_no_division_by_zero():
    x = torch.full((1, 8, 3, 4, 4), 3.3).bfloat16()
    assert spread(affine_norm().bfloat16(), x).isfinite().all()


def test_a_cpu_and_gradients_take_torchs_kernel():
    norm, x = affine_norm(), torch.randn(1, 8, 2, 3, 3)
    assert torch.equal(group_norm(norm, x), norm(x))
