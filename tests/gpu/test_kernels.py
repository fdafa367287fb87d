"""Attention by name, the ring's kernels, rotations and GroupNorm, against plain torch."""

import pytest
import torch
from torch import nn

from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.ring import block_kernels, math_backward, math_forward
from opensora.config.choices import ATTENTION_KERNELS
from opensora.models.mmdit.attention import attention_kernel, attention_math, rotary_table, rotation
from opensora.models.vae.group_norm import group_norm, spread_group_norm
from opensora.utils.errors import UserError
from tests.parallel.tiny import tiny_inputs, tiny_model

# of values around one in bf16, whose rounding is 2^-8; kernels that quantise say so in their name
TOLERANCE = 2e-2
APPROXIMATE = {"sage": 0.15}


def heads(device, length=320, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 3, 128, generator=generator).to(device, dtype) for _ in range(3)]


def or_skip(name):
    """A kernel by name, skipped where it is not installed or not for this card."""
    try:
        return attention_kernel(name)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.anywhere
@pytest.mark.parametrize("name", [*ATTENTION_KERNELS, "auto"])
def test_attention_by_name(device, name):
    kernel = or_skip(name)
    q, k, v = heads(device)
    exact = attention_math(*(x.double() for x in (q, k, v)))
    error = (kernel(q, k, v).double() - exact).abs().max()
    assert error < APPROXIMATE.get(name, TOLERANCE)


@pytest.mark.anywhere
@pytest.mark.parametrize("name", [name for name in ATTENTION_KERNELS if name not in APPROXIMATE])
def test_attention_backward(device, name):
    kernel = or_skip(name)
    given = [x.requires_grad_() for x in heads(device)]
    doubled = [x.detach().double().requires_grad_() for x in given]
    out = kernel(*given)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = torch.autograd.grad(out, given, probe.to(out.dtype))
    exact = torch.autograd.grad(attention_math(*doubled), doubled, probe.double())
    for mine, theirs in zip(found, exact):
        assert (mine.double() - theirs).norm() < TOLERANCE * theirs.norm()


@pytest.mark.anywhere
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "flash2"])
def test_ring_kernels(device, name):
    """Forward, log-sum-exp and backward of the block kernels that this device takes."""
    or_skip(name)
    q, k, v = (x.transpose(1, 2).contiguous() for x in heads(device))  # [B, H, L, D]
    forward, backward = block_kernels(q, name)
    block, kept = forward(q, k, v)
    exact, _ = math_forward(*(x.double() for x in (q, k, v)))
    assert (block.out.double() - exact.out).abs().max() < TOLERANCE
    assert (block.lse.double() - exact.lse).abs().max() < TOLERANCE
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device, q.dtype)
    found = backward(grad, q, k, v, block.out, block.lse, kept)
    expected = math_backward(grad.double(), *(x.double() for x in (q, k, v)), exact.out, exact.lse, None)
    for mine, theirs in zip(found, expected):
        assert (mine.double() - theirs).norm() < TOLERANCE * theirs.norm()


@pytest.mark.parametrize("half_split", [True, False])
def test_compiled_blocks(device, half_split, precise):
    """Triton's kernels against torch's, in both rotary layouts; what is fused rounds otherwise."""
    model = tiny_model(depth=2, use_liger_rope=half_split).eval().to(device)
    inputs = {name: x.to(device) for name, x in tiny_inputs(image=64).items()}
    with torch.no_grad():
        plain = model(**inputs)
        assert compile_blocks(model) == 2
        torch.testing.assert_close(model(**inputs), plain, atol=1e-4, rtol=1e-4)


def test_ligers_rotation_is_ours(device):
    try:
        theirs = rotation(half_split=True, backend="liger")
    except UserError as error:
        pytest.skip(str(error))
    q, k, _ = heads(device, dtype=torch.float32)
    ids = torch.randint(0, 30, (2, q.shape[1], 3), generator=torch.Generator().manual_seed(1)).to(device)
    rope = rotary_table(ids.float(), [16, 56, 56], 10_000)
    for mine, other in zip(rotation(half_split=True)(q, k, rope), theirs(q, k, rope)):
        torch.testing.assert_close(other, mine, atol=1e-4, rtol=1e-4)


@pytest.mark.anywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 5, 33, 47), (2, 64, 1, 8, 8), (1, 64, 300)])
def test_group_norm(device, dtype, shape):
    norm = nn.GroupNorm(32, 64, eps=1e-6).to(device, dtype).requires_grad_(False)
    nn.init.normal_(norm.weight)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 2).to(device, dtype)
    exact = norm.double()(x.double())
    norm = norm.to(dtype)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        for found in (spread_group_norm(x, 32, norm.weight, norm.bias, norm.eps), group_norm(norm, x)):
            torch.testing.assert_close(found.double(), exact, atol=max(8 * eps, 1e-5), rtol=max(4 * eps, 1e-5))


def test_group_norm_of_more_elements_than_32_bits_count(device):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of the GPU")
    x = torch.randn(1, 64, 1, 6000, 6000, device=device, dtype=torch.bfloat16)
    norm = nn.GroupNorm(32, 64, eps=1e-6).to(device, x.dtype)
    with torch.no_grad():
        found = group_norm(norm, x)
        assert (found[0, ::9] - norm(x)[0, ::9]).abs().max() < 0.1
