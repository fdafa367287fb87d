"""Rotary positions and joint attention, with every kernel behind a name.

Shapes: B batch, L tokens, H heads, D head dimension. Kernels take and return ``[B, L, H, D]``; attention is full and
has no mask, so the order of the keys never matters. A further kernel is added from outside, and chosen as
``model.attn_backend``::

    @ATTENTION_KERNELS.register("mine")
    def mine(q, k, v): ...
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from opensora.config.choices import ATTENTION_KERNELS
from opensora.models.mmdit.kernels import (
    AttentionKernel,
    Card,
    OptionalKernel,
    TorchKernel,
    attention_sdpa,
    fastest,
    where_it_can,
)
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.optional import require

logger = get_logger(__name__)

__all__ = ["ATTENTION_KERNELS", "JointAttention", "attention_kernel", "attention_sdpa", "resolve_attention"]


class Rotary(NamedTuple):
    """Rotation of every token: ``cos`` and ``sin``, both ``[B, L, 1, D/2]`` float32."""

    cos: Tensor
    sin: Tensor


Rotation = Callable[[Tensor, Tensor, Rotary], tuple[Tensor, Tensor]]


def rotary_table(ids: Tensor, axes_dim: list[int], theta: float) -> Rotary:
    """Rotary angles of multi-axis positions (RoFormer, arXiv:2104.09864; one frequency band per axis as in FLUX.1).

    Args:
        ids: ``[B, L, len(axes_dim)]`` positions (latent frame, row, column); text tokens are all zero.
        axes_dim: head channels spent on each axis, even numbers that sum to the head dimension.
        theta: base of the frequencies; axis ``i`` turns at ``theta ** (-2 k / axes_dim[i])``.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        # double precision: float32 loses about 1e-5 rad at a few hundred tokens
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[..., axis, None].double() * theta**-exponent)
    angle = torch.cat(angles, dim=-1).unsqueeze(2)  # [B, L, 1, D/2]
    return Rotary(angle.cos().float(), angle.sin().float())


class RotaryTable(nn.Module):
    """:func:`rotary_table` as a module without parameters, so that a sampler may keep what it computes.

    Args:
        axes_dim, theta: see there.
    """

    def __init__(self, axes_dim: list[int], theta: float):
        super().__init__()
        self.axes_dim, self.theta = axes_dim, theta

    def forward(self, ids: Tensor) -> Rotary:
        """``ids`` ``[B, L, axes]`` of all tokens -> their table."""
        return rotary_table(ids, self.axes_dim, self.theta)


def rotate_interleaved(x: Tensor, rope: Rotary) -> Tensor:
    """Rotate adjacent channel pairs (2k, 2k+1) of ``x`` ``[B, L, H, D]``, in float32: the layout of FLUX.1."""
    if torch.compiler.is_compiling():  # which fuses real numbers, but knows no complex ones
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pair = (even * rope.cos - odd * rope.sin, odd * rope.cos + even * rope.sin)
        return torch.stack(pair, dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(rope.cos, rope.sin)  # one pass over x, against six for real and imaginary parts
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_half_split(x: Tensor, rope: Rotary) -> Tensor:
    """Rotate channel pairs (k, k + D/2) of ``x`` ``[B, L, H, D]``, in float32: the layout of the video models."""
    wide = x.float()
    cos, sin = torch.cat((rope.cos, rope.cos), dim=-1), torch.cat((-rope.sin, rope.sin), dim=-1)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


LIGER_HINT = "`pip install liger-kernel` (NVIDIA or AMD GPU with Triton), or choose 'torch'"


def attention_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v written out, scores in float32: the reference, quadratic in memory."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).float() * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1).to(v.dtype), v)


def liger_rotation() -> Rotation:
    """`rotate_half_split` of q and k at once by liger's Triton kernel (GPU only).

    Raises:
        UserError: liger is not installed.
    """
    function = require("liger_kernel.ops.rope", "rope_backend='liger'", LIGER_HINT).LigerRopeFunction

    def rotate(q: Tensor, k: Tensor, rope: Rotary) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.cat((half, half), dim=-1).squeeze(2) for half in rope)  # [B, L, D]
        q, k = function.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rotate


def rotation(half_split: bool, backend: str = "torch") -> Rotation:
    """Function ``(q, k, rope) -> (q, k)`` of a rotary layout and backend, see `JointAttention`.

    Raises:
        UserError: liger with the interleaved layout, or not installed.
    """
    if backend == "liger":
        if not half_split:
            raise UserError("rope_backend='liger' has the half-split layout only: set use_liger_rope=True or 'torch'.")
        return liger_rotation()
    rotate = rotate_half_split if half_split else rotate_interleaved
    return lambda q, k, rope: (rotate(q, rope), rotate(k, rope))


def is_approximate(name: str) -> bool:
    """Whether results of a kernel differ from the others' by more than rounding."""
    return name in ATTENTION_KERNELS and bool(getattr(ATTENTION_KERNELS.get(name), "approximate", False))


def check_trains(name: str) -> None:
    """Raise a UserError for a kernel that has no backward pass."""
    kernel = ATTENTION_KERNELS.get(name) if name in ATTENTION_KERNELS else None
    if isinstance(kernel, OptionalKernel) and kernel.approximate:
        raise UserError(
            f"model.attn_backend={name}: it is for sampling, and has no backward pass; auto takes one that has"
        )


def resolve_attention(name: str, card: Card | None = None) -> str:
    """Concrete kernel of a name: ``auto`` becomes the fastest exact one present, others are checked. What is chosen for
    the user, and what is approximate, is logged.

    Args:
        name: of a kernel, or ``auto``.
        card: what the choice depends on; None looks at this machine.

    Raises:
        UserError: unknown name, or a kernel that is not installed or does not run on this card.
    """
    names = [*ATTENTION_KERNELS, "auto"]
    if name not in names:
        raise UserError(f"attn_backend={name!r} is not an attention kernel; choose one of {', '.join(names)}.")
    card = card or Card.here()
    if name == "auto":
        name = fastest(card)
        logger.info("attn_backend='auto' uses the attention kernel %r", name)
    attention_kernel(name, card=card)
    if is_approximate(name):
        logger.warning("attn_backend=%r is approximate: results differ from other kernels' by more than rounding", name)
    return name


def attention_kernel(name: str, lenient: bool = False, card: Card | None = None) -> AttentionKernel:
    """Function behind the name of a kernel; all but approximate ones compute the same full attention.

    Args:
        name: of a kernel, or ``auto``.
        lenient: `attention_sdpa` takes the inputs that the kernel does not.
        card: as in `resolve_attention`.

    Raises:
        UserError: as `resolve_attention`.
    """
    card = card or Card.here()
    if name == "auto" or name not in ATTENTION_KERNELS:
        return attention_kernel(resolve_attention(name, card), True, card)
    kernel: Any = ATTENTION_KERNELS.get(name)
    if not isinstance(kernel, OptionalKernel | TorchKernel):
        return cast(AttentionKernel, kernel)
    loaded = kernel.load(name, card)
    return where_it_can(loaded) if lenient else loaded


class JointAttention(nn.Module):
    """Attention over text and image tokens together; it owns no parameters.

    Parallelism replaces this module by a subclass that overrides `attend`; rotary positions are applied before, to
    the tokens this rank holds.

    Args:
        backend: attention kernel by name, see `resolve_attention`.
        half_split: rotary layout, channel pairs (k, k + D/2) if true, else (2k, 2k + 1).
        rope_backend: "torch", or "liger" for its fused kernel (half-split layout only).
        lenient: the kernel was chosen by ``auto``, so `attention_sdpa` takes the inputs that it does not.
    """

    def __init__(
        self, backend: str = "sdpa", half_split: bool = False, rope_backend: str = "torch", lenient: bool = False
    ):
        super().__init__()
        self.lenient = lenient or backend == "auto"
        self.backend = resolve_attention(backend) if backend == "auto" else backend
        self.half_split = half_split
        self.rope_backend = rope_backend
        self.kernel = attention_kernel(self.backend, self.lenient)
        self.rotate = rotation(half_split, rope_backend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention; q, k, v and the result are ``[B, L, H, D]``."""
        return self.kernel(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rope: Rotary) -> Tensor:
        """Rotate q and k, attend, join heads: three ``[B, L, H, D]`` -> ``[B, L, H*D]``."""
        q, k = self.rotate(q, k, rope)
        return self.attend(q, k, v).flatten(2)
