"""Attention kernels and rotary layouts by name; those that are absent say how to get them."""

import dataclasses
import logging
import sys
import types

import pytest
import torch
from torch import nn

from opensora.acceleration.ring import block_kernels, cpu_forward, math_forward, ring_kernel
from opensora.acceleration.sequence_parallel import check_mode
from opensora.models.mmdit import MMDiTConfig, attention
from opensora.models.mmdit.attention import (
    ATTENTION_KERNELS,
    JointAttention,
    Rotary,
    attention_kernel,
    resolve_attention,
    rotary_table,
    rotate_half_split,
    rotate_interleaved,
)
from opensora.models.mmdit.layers import RMSNorm
from opensora.utils.errors import UserError


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(2, 9, 3, 8) for _ in range(3)]


@pytest.fixture
def rope():
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(3)).expand(2, -1, -1)
    return rotary_table(ids, [2, 2, 4], 10000)


def test_sdpa_is_the_written_out_reference(qkv, rope):
    qkv = [x.requires_grad_() for x in qkv]
    results = {}
    for name in ("sdpa", "math"):
        out = JointAttention(name)(*qkv, rope)
        results[name] = [out, *torch.autograd.grad(out.square().sum(), qkv)]
    assert results["sdpa"][0].shape == (2, 9, 24)
    for one, other in zip(results["sdpa"], results["math"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_attention_owns_nothing():
    assert not JointAttention().state_dict()
    assert not list(JointAttention().parameters())


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
def test_rotation_is_relative_and_keeps_dtype(rotate):
    """q.k depends on the distance of two positions only (RoFormer, equation 11)."""
    q, k = torch.randn(2, 1, 1, 1, 16)
    ids = torch.tensor([[[2, 7, 1]], [[5, 9, 1]], [[12, 17, 11]], [[15, 19, 11]]])  # [4, 1, 3]; pairs of equal distance
    table = rotary_table(ids, [4, 6, 6], 100.0)
    turned_q, turned_k = rotate(q.expand(4, 1, 1, 16), table), rotate(k.expand(4, 1, 1, 16), table)
    scores = (turned_q[[0, 2]] * turned_k[[1, 3]]).sum(-1)
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.expand(4, 1, 1, 16).norm(dim=-1))
    assert rotate(q.bfloat16(), Rotary(table.cos[:1], table.sin[:1])).dtype == torch.bfloat16


def test_rotary_table_is_exact_far_out():
    ids = torch.tensor([[[0, 0, 250]]])
    exact = torch.tensor(250.0, dtype=torch.float64) * torch.tensor(10000.0, dtype=torch.float64) ** -0.5
    table = rotary_table(ids.bfloat16(), [2, 2, 4], 10000)
    assert table.cos.shape == (1, 1, 1, 4)
    assert table.cos[0, 0, 0, 3].item() == exact.cos().float().item()


@pytest.mark.parametrize(("name", "hint"), [("flash2", "flash-attn"), ("flash3", "hopper"), ("xformers", "xformers")])
def test_absent_kernels_say_how_to_get_them(name, hint, monkeypatch):
    module = ATTENTION_KERNELS.get(name).module
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)  # as if not installed
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"attn_backend='{name}'.*{hint}"):
        JointAttention(name)


def test_unknown_kernel_lists_the_known_ones():
    with pytest.raises(UserError, match="sdpa, math, flash3, flash2, xformers, auto"):
        resolve_attention("fast")


def test_a_kernel_of_ones_own(qkv, rope, monkeypatch):
    monkeypatch.setattr(ATTENTION_KERNELS, "_added", {})

    @ATTENTION_KERNELS.register("blocks_of_queries")
    def blocks_of_queries(q, k, v):
        return torch.cat([attention.attention_math(part, k, v) for part in q.split(4, dim=1)], dim=1)

    torch.testing.assert_close(JointAttention("blocks_of_queries")(*qkv, rope), JointAttention("math")(*qkv, rope))
    with pytest.raises(UserError, match="xformers, blocks_of_queries, auto"):
        resolve_attention("fast")


def test_help_names_every_kernel():
    help = next(field for field in dataclasses.fields(MMDiTConfig) if field.name == "attn_backend").metadata["help"]
    assert all(name in help for name in (*ATTENTION_KERNELS.places, "auto"))


@pytest.mark.parametrize("name", ["flash2", "flash3", "xformers", "mine"])
def test_the_ring_refuses_kernels_that_it_cannot_use(name):
    with pytest.raises(UserError, match=f"attn_backend='{name}' cannot be used by ring attention.*sdpa.*all_to_all"):
        check_mode("ring_attn", 4, 2, name)
    check_mode("all_to_all", 4, 2, name)


def test_the_ring_uses_the_kernel_of_the_name():
    q = torch.zeros(1, 2, 3, 8)
    for name in ("sdpa", "auto"):
        check_mode("ring_attn", 4, 2, name)
        assert block_kernels(q, ring_kernel(name))[0] is cpu_forward
    assert block_kernels(q, ring_kernel("math"))[0] is math_forward


def test_auto_logs_its_choice(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="opensora"):
        assert resolve_attention("auto") == "sdpa"
    assert "'sdpa'" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_importable", lambda module: module in ("flash_attn", "flash_attn_interface"))
    monkeypatch.setattr(attention, "require", lambda *args: None)
    for major, choice in ((9, "flash3"), (8, "flash2")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        assert resolve_attention("auto") == choice


def as_module(monkeypatch, name, **functions):
    """Put a stand-in for an optional module where imports find it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    for key, value in functions.items():
        setattr(sys.modules[name], key, value)


@pytest.mark.parametrize(
    ("name", "module", "function", "wrap"),
    [
        ("flash2", "flash_attn", "flash_attn_func", lambda out: out),
        ("flash3", "flash_attn_interface", "flash_attn_func", lambda out: (out, None)),
        ("flash3", "flash_attn_interface", "flash_attn_func", lambda out: out),
        ("xformers", "xformers.ops", "memory_efficient_attention", lambda out: out),
    ],
)
def test_optional_kernels_get_tokens_before_heads(name, module, function, wrap, qkv, monkeypatch):
    as_module(monkeypatch, module, **{function: lambda q, k, v: wrap(attention.attention_math(q, k, v))})
    torch.testing.assert_close(attention_kernel(name)(*qkv), attention.attention_math(*qkv))


def test_liger_rope_is_called_with_heads_before_tokens(qkv, rope, monkeypatch):
    def apply(q, k, cos, sin):
        assert q.shape == (2, 3, 9, 8)
        assert cos.shape == (2, 9, 8)

        def turn(x):  # rotate-half, as liger documents it
            low, high = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]

        return turn(q), turn(k)

    as_module(monkeypatch, "liger_kernel.ops.rope", LigerRopeFunction=types.SimpleNamespace(apply=apply))
    fused, plain = (JointAttention(half_split=True, rope_backend=name) for name in ("liger", "torch"))
    torch.testing.assert_close(fused(*qkv, rope), plain(*qkv, rope))
    with pytest.raises(UserError, match="half-split"):
        JointAttention(half_split=False, rope_backend="liger")


def test_liger_norm(qkv, monkeypatch):
    def apply(x, scale, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + scale)

    as_module(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=types.SimpleNamespace(apply=apply))
    fused, plain = RMSNorm(8, "liger"), RMSNorm(8)
    for norm in (fused, plain):
        norm.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
    torch.testing.assert_close(fused(qkv[0]), plain(qkv[0]))


def test_absent_liger_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match=r"norm_backend='liger'.*pip install liger-kernel"):
        RMSNorm(8, "liger")
    with pytest.raises(UserError, match=r"rope_backend='liger'.*pip install liger-kernel"):
        JointAttention(half_split=True, rope_backend="liger")
