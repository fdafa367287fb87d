"""Attention kernels and rotary layouts by name; those that are absent say how to get them."""

import dataclasses
import logging
import sys
import types

import pytest
import torch
from torch import nn

from opensora.acceleration.ring import (
    block_kernels,
    cpu_forward,
    cuda_forward,
    cudnn_forward,
    math_forward,
    ring_kernel,
)
from opensora.acceleration.sequence_parallel import check_mode
from opensora.models.mmdit import MMDiTConfig, attention
from opensora.models.mmdit.attention import (
    ATTENTION_KERNELS,
    JointAttention,
    Rotary,
    attention_kernel,
    check_trains,
    is_approximate,
    resolve_attention,
    rotary_table,
    rotate_half_split,
    rotate_interleaved,
)
from opensora.models.mmdit.kernels import Card, fastest
from opensora.models.mmdit.layers import RMSNorm
from opensora.utils.errors import UserError


def card_of(major, cudnn):
    return Card((major, 0), cudnn, lambda module: False)


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


@pytest.mark.parametrize("name", ["flash3", "xformers", "sage", "mine"])
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


@pytest.mark.parametrize(
    ("name", "given", "kernel"),
    [
        ("auto", card_of(9, cudnn=True), cudnn_forward),
        ("sdpa", card_of(9, cudnn=False), cuda_forward),
        ("sdpa", card_of(8, cudnn=True), cuda_forward),
        ("flash2", card_of(9, cudnn=True), cuda_forward),
        ("cudnn", card_of(8, cudnn=True), cudnn_forward),
        ("math", card_of(9, cudnn=True), math_forward),
    ],
)
def test_the_ring_takes_the_fastest_kernel_of_the_card(name, given, kernel):
    """Shapes alone, which torch knows without a GPU: the log-sum-exp fits what blocks are merged by."""
    q, k, v = (torch.empty(1, 2, length, 16, dtype=torch.bfloat16, device="meta") for length in (3, 5, 5))
    forward, backward = block_kernels(q, ring_kernel(name), given)
    assert forward is kernel
    block, extra = forward(q, k, v)
    assert (block.out.shape, block.lse.shape) == (q.shape, q.shape[:-1])
    if kernel is not math_forward:
        assert block.lse.dtype == torch.float32
    grads = backward(q, q, k, v, block.out, block.lse, extra)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert block_kernels(q.float(), ring_kernel(name), given)[0] is math_forward


def test_auto_logs_its_choice(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="opensora"):
        assert resolve_attention("auto") == "sdpa"
    assert "'sdpa'" in caplog.text


def card(*capability, cudnn=False, packages=()):
    return Card(capability or None, cudnn, lambda module: module in packages)


EVERY = ("flash_attn", "flash_attn_interface", "xformers.ops", "sageattention")


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (card(packages=EVERY), "sdpa"),
        (card(7, 5, cudnn=True, packages=EVERY), "xformers"),  # flash-attention starts with Ampere
        (card(7, 5, cudnn=True, packages=["flash_attn"]), "sdpa"),
        (card(8, 0, cudnn=True, packages=EVERY), "flash2"),
        (card(8, 9, cudnn=True), "sdpa"),
        (card(9, 0, cudnn=True, packages=EVERY), "flash3"),
        (card(9, 0, cudnn=True, packages=["flash_attn", "sageattention"]), "cudnn"),
        (card(9, 0, packages=["flash_attn"]), "flash2"),
        (card(10, 0, cudnn=True, packages=EVERY), "cudnn"),
        (card(12, 0, cudnn=True, packages=["flash_attn"]), "flash2"),
    ],
)
def test_auto_takes_the_fastest_exact_one(given, choice):
    assert fastest(given) == choice
    assert not is_approximate(choice)


def test_auto_says_its_choice_and_runs_on_what_it_does_not_take(qkv, caplog):
    with caplog.at_level(logging.INFO, logger="opensora"):
        assert resolve_attention("auto", card(9, 0, cudnn=True)) == "cudnn"
    assert "'cudnn'" in caplog.text
    lenient = attention_kernel("cudnn", lenient=True, card=card(9, 0, cudnn=True))  # of fp32 there is none
    torch.testing.assert_close(lenient(*qkv), attention.attention_math(*qkv))
    with pytest.raises(UserError, match="attn_backend='cudnn' works in bf16 and fp16"):
        attention_kernel("cudnn", card=card(9, 0, cudnn=True))(*qkv)


@pytest.mark.parametrize("given", [card(), card(7, 5, cudnn=True), card(8, 0)])
def test_cudnn_needs_its_card(given):
    with pytest.raises(UserError, match=r"attn_backend='cudnn' needs an NVIDIA GPU of compute capability 8.0"):
        resolve_attention("cudnn", given)


def test_flash2_is_torchs_own_where_the_package_is_not(qkv):
    """Both are FlashAttention-2; torch has one for CPUs as well."""
    half = [x.bfloat16() for x in qkv]
    out = attention_kernel("flash2", card=card(8, 6))(*half)
    torch.testing.assert_close(out, attention.attention_math(*half), rtol=2e-2, atol=2e-2)
    with pytest.raises(UserError, match=r"attn_backend='flash2' needs the module flash_attn"):
        attention_kernel("flash2", card=card(7, 5))


def test_flash3_comes_from_the_package_kernels_too(qkv, monkeypatch):
    asked = []
    stand_in = types.SimpleNamespace(flash_attn_func=lambda q, k, v: (attention.attention_math(q, k, v), None))
    as_module(monkeypatch, "kernels", get_kernel=lambda name: asked.append(name) or stand_in)
    kernel = attention_kernel("flash3", card=card(9, 0, packages=["kernels"]))
    torch.testing.assert_close(kernel(*qkv), attention.attention_math(*qkv))
    assert asked == ["kernels-community/flash-attn3"]


def test_sage_is_approximate_and_for_sampling(qkv, monkeypatch, caplog):
    def sageattn(q, k, v, tensor_layout):
        assert tensor_layout == "NHD"
        return attention.attention_math(q, k, v)

    as_module(monkeypatch, "sageattention", sageattn=sageattn)
    with caplog.at_level(logging.WARNING, logger="opensora"):
        assert resolve_attention("sage") == "sage"
    assert "attn_backend='sage' is approximate" in caplog.text
    assert is_approximate("sage")
    torch.testing.assert_close(attention_kernel("sage")(*qkv), attention.attention_math(*qkv))
    with pytest.raises(UserError, match="attn_backend='sage' is for sampling"):
        attention_kernel("sage")(*[x.requires_grad_() for x in qkv])
    with pytest.raises(UserError, match="model.attn_backend=sage: it is for sampling"):
        check_trains("sage")
    check_trains("auto")


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
