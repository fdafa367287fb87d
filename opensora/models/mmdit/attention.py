"""Rotary positions and joint attention, with every kernel behind a name.

Shapes: B batch, L tokens, H heads, D head dimension. Kernels take and return ``[B, L, H, D]``; attention is full and
has no mask, so the order of the keys never matters. A further kernel is added from outside, and chosen as
``model.attn_backend``::

    @ATTENTION_KERNELS.register("mine")
    def mine(q, k, v): ...
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.config.choices import ATTENTION_KERNELS as ATTENTION_KERNELS
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(rope.cos, rope.sin)  # one pass over x, against six for real and imaginary parts
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_half_split(x: Tensor, rope: Rotary) -> Tensor:
    """Rotate channel pairs (k, k + D/2) of ``x`` ``[B, L, H, D]``, in float32: the layout of the video models."""
    wide = x.float()
    cos, sin = torch.cat((rope.cos, rope.cos), dim=-1), torch.cat((-rope.sin, rope.sin), dim=-1)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


LIGER_HINT = "`pip install liger-kernel` (NVIDIA or AMD GPU with Triton), or choose 'torch'"


def require(module: str, wanted_by: str, hint: str) -> Any:
    """Import an optional module, or raise a UserError that says who asked for it and how to get it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken binary raises OSError or RuntimeError as often as ImportError
        raise UserError(
            f"{wanted_by} needs the module {module.split('.')[0]}, which cannot be imported here ({error}). "
            f"To get it: {hint}."
        ) from error


@dataclass(frozen=True)
class OptionalKernel:
    """An attention kernel of a package that is not part of torch; they run on GPUs in float16 or bfloat16 only.

    Attributes:
        module: to import when the kernel is chosen.
        function: its kernel; of a tuple that it returns the first part is taken (some also return the log-sum-exp).
        hint: how a user gets it.
    """

    module: str
    function: str
    hint: str

    def require(self, name: str) -> Any:
        """The module; a UserError tells a user that chose the kernel as ``name`` how to get it."""
        return require(self.module, f"attn_backend={name!r}", self.hint)

    def load(self, name: str) -> AttentionKernel:
        """The kernel. Raises as :meth:`require`."""
        function = getattr(self.require(name), self.function)

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return kernel


flash3 = OptionalKernel(
    "flash_attn_interface",
    "flash_attn_func",
    "build the `hopper` folder of github.com/Dao-AILab/flash-attention (H100/H200)",
)
flash2 = OptionalKernel("flash_attn", "flash_attn_func", "`pip install flash-attn --no-build-isolation` (needs nvcc)")
xformers = OptionalKernel("xformers.ops", "memory_efficient_attention", "`pip install xformers`")


def attention_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v written out, scores in float32: the reference, quadratic in memory."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).float() * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1).to(v.dtype), v)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled dot product attention: runs everywhere and picks flash, cuDNN or CPU kernels itself."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


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


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def resolve_attention(name: str) -> str:
    """Concrete kernel of a name: ``auto`` becomes the fastest one present (and is logged), others are checked.

    Raises:
        UserError: unknown name, or a kernel that is not installed.
    """
    names = [*ATTENTION_KERNELS, "auto"]
    if name not in names:
        raise UserError(f"attn_backend={name!r} is not an attention kernel; choose one of {', '.join(names)}.")
    if name == "auto":
        name = "sdpa"
        if torch.cuda.is_available():
            shipped = {"flash3": flash3, "flash2": flash2, "xformers": xformers}
            present = [each for each, kernel in shipped.items() if _importable(kernel.module)]
            # flash-attention 3 is compiled for Hopper only
            if torch.cuda.get_device_capability()[0] != 9:
                present = [each for each in present if each != "flash3"]
            name = next(iter(present), name)
        logger.info("attn_backend='auto' uses the attention kernel %r", name)
    kernel = ATTENTION_KERNELS.get(name)
    if isinstance(kernel, OptionalKernel):
        kernel.require(name)
    return name


def attention_kernel(name: str) -> AttentionKernel:
    """Function behind a kernel name (see `resolve_attention`); all compute the same full attention."""
    name = resolve_attention(name)
    kernel = ATTENTION_KERNELS.get(name)
    return kernel.load(name) if isinstance(kernel, OptionalKernel) else kernel


class JointAttention(nn.Module):
    """Attention over text and image tokens together; it owns no parameters.

    Parallelism replaces this module by a subclass that overrides `attend`; rotary positions are applied before, to
    the tokens this rank holds.

    Args:
        backend: attention kernel by name, see `resolve_attention`.
        half_split: rotary layout, channel pairs (k, k + D/2) if true, else (2k, 2k + 1).
        rope_backend: "torch", or "liger" for its fused kernel (half-split layout only).
    """

    def __init__(self, backend: str = "sdpa", half_split: bool = False, rope_backend: str = "torch"):
        super().__init__()
        self.backend = resolve_attention(backend)
        self.half_split = half_split
        self.rope_backend = rope_backend
        self.kernel = attention_kernel(self.backend)
        self.rotate = rotation(half_split, rope_backend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention; q, k, v and the result are ``[B, L, H, D]``."""
        return self.kernel(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rope: Rotary) -> Tensor:
        """Rotate q and k, attend, join heads: three ``[B, L, H, D]`` -> ``[B, L, H*D]``."""
        q, k = self.rotate(q, k, rope)
        return self.attend(q, k, v).flatten(2)
