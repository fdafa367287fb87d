"""Gradient checkpointing changes memory, never numbers."""

from dataclasses import replace

import pytest
import torch

from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.mmdit.model import MMDiTModel
from opensora.training.weights.recompute import HostBuffer, OffloadedRecompute, apply_recompute

SIZES = dict(
    in_channels=8, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
    depth_single_blocks=3, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MMDiTModel(MMDiTConfig(**SIZES)).train()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return dict(
        img=torch.randn(2, 6, 8), img_ids=torch.arange(6.0).view(1, 6, 1).expand(2, 6, 3), txt=torch.randn(2, 3, 12),
        txt_ids=torch.zeros(2, 3, 3), timesteps=torch.rand(2), y_vec=torch.randn(2, 8),
    )  # fmt: skip


def result(model, inputs):
    """Output and gradients."""
    model.zero_grad()
    out = model(**inputs)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("settings", [None, (1, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("size", [0, 2000, 10**6])  # on the device, a buffer too small for all, one large enough
def test_equals_plain_backward(model, inputs, settings, size):
    plain = result(model, inputs)
    model.config = replace(model.config, grad_ckpt_settings=settings)
    apply_recompute(model, True, size, torch.device("cpu"))
    runs = {"double": 0, "single": 0}
    for kind, blocks in (("double", model.double_blocks), ("single", model.single_blocks)):
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, kind=kind: runs.update({kind: runs[kind] + 1}))
    for again in (result(model, inputs), result(model, inputs)):  # the buffer is free again for a second step
        assert all(torch.equal(a, b) for a, b in zip(plain, again))
    double, single = settings or (2, 3)
    assert runs == {"double": 2 * (2 + double), "single": 2 * (3 + single)}  # recomputed blocks run twice
    if size:
        assert model.recompute.buffer.free_bytes == size


def test_switched_off(model):
    model.config = replace(model.config, grad_ckpt_settings=(1, 1))
    apply_recompute(model, False, 100, torch.device("cpu"))
    assert model.grad_ckpt_settings == (0, 0)


def test_inputs_wait_in_the_buffer(model, inputs):
    apply_recompute(model, True, 10**6, torch.device("cpu"))
    out = model(**inputs)
    recompute = model.recompute
    assert isinstance(recompute, OffloadedRecompute)
    # img [2, 6, 32] and txt [2, 3, 32] of two double blocks, both together of three single blocks, in pieces of 256 B
    assert 10**6 - recompute.buffer.free_bytes == 2 * (1536 + 768) + 3 * 2304
    out.sum().backward()
    assert recompute.buffer.free_bytes == 10**6


def test_buffer_lends_and_takes_back():
    buffer = HostBuffer(1024, pinned=False)
    pieces = [buffer.take(torch.zeros(64)) for _ in range(4)]
    assert all(p is not None for p in pieces)
    assert buffer.take(torch.zeros(1)) is None
    for p in (pieces[2], pieces[0], pieces[1]):
        buffer.give_back(p[1])
    view, piece = buffer.take(torch.zeros(3, 64, dtype=torch.float32))  # the three are one again
    assert view.shape == (3, 64)
    assert piece == (0, 768)
