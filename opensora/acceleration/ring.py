"""Ring attention (arXiv:2310.01889): keys and values travel around the ranks, each block of them attended in turn.

Blocks are merged by their log-sum-exp, so the result is that of full attention up to rounding. While a block is
computed the next one is on its way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.acceleration.parallel_context import Axis
from opensora.models.mmdit.kernels import HALF, MAX_HEAD_DIM, Card, prefers_cudnn
from opensora.utils.errors import UserError


class Block(NamedTuple):
    """Attention of queries to some of the keys: ``out`` ``[B, H, L, D]``, log-sum-exp ``lse`` ``[B, H, L]`` float32."""

    out: Tensor
    lse: Tensor


Forward = Callable[[Tensor, Tensor, Tensor], tuple[Block, Any]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]


def math_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Block, None]:
    """Block attention written out; q, k, v ``[B, H, L, D]``. Scores in float32 at least."""
    scores = _scores(q, k)
    lse = scores.logsumexp(dim=-1)
    return Block((scores - lse[..., None]).exp().to(v.dtype) @ v, lse), None


def math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the output and log-sum-exp over all blocks (FlashAttention, arXiv:2205.14135)."""
    probability = (_scores(q, k) - lse[..., None]).exp()
    grad, out = grad.to(probability.dtype), out.to(probability.dtype)
    d_scores = probability * (grad @ v.to(grad.dtype).mT - (grad * out).sum(dim=-1, keepdim=True))
    d_scores = d_scores * q.shape[-1] ** -0.5
    d_q, d_k = d_scores @ k.to(grad.dtype), d_scores.mT @ q.to(grad.dtype)
    return d_q.to(q.dtype), d_k.to(k.dtype), (probability.mT @ grad).to(v.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    return (q @ k.mT).to(exact) * q.shape[-1] ** -0.5


def cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Block, None]:
    """Block attention by torch's blockwise CPU kernel: memory linear in the number of tokens."""
    return Block(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)), None


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `cpu_forward`, see `math_backward`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.to(torch.promote_types(q.dtype, torch.float32)), 0.0, False
    )


def cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Block, tuple[Any, ...]]:
    """Block attention by torch's flash kernel (16-bit, head dimension a multiple of 8)."""
    out, lse, *extra, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return Block(out, lse), tuple(extra)  # cumulative lengths, longest lengths, random state (unused without dropout)


def cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `cuda_forward`, see `math_backward`."""
    cum_q, cum_k, max_q, max_k, seed, offset = extra
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
    )


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Block, tuple[Any, ...]]:
    """Block attention by cuDNN's kernel, as torch calls it (16-bit, head dimension a multiple of 8, at most 128)."""
    out, lse, *extra, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return Block(out, lse.view(q.shape[:-1])), tuple(extra)  # it comes as [B, H, L, 1]


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `cudnn_forward`, see `math_backward`."""
    cum_q, cum_k, max_q, max_k, seed, offset = extra
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse[..., None], seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
    )


RING_KERNELS = ("sdpa", "math", "cudnn", "flash2", "auto")


def ring_kernel(name: str) -> str:
    """What attends blocks where a model's attention kernel is called so: ``sdpa``, ``math``, ``cudnn`` or ``flash2``
    (torch's); ``auto`` is ``sdpa``, which here is the fastest of them.

    Raises:
        UserError: a kernel that gives no log-sum-exp, without which blocks cannot be merged.
    """
    if name not in RING_KERNELS:
        raise UserError(
            f"attn_backend={name!r} cannot be used by ring attention, which knows sdpa (the fastest of torch's "
            "kernels), cudnn, flash2 and math; choose one of these, or --plugin_config.sequence_parallelism_mode "
            "all_to_all, which runs any kernel"
        )
    return "sdpa" if name == "auto" else name


def block_kernels(q: Tensor, name: str = "sdpa", card: Card | None = None) -> tuple[Forward, Backward]:
    """Kernels of :func:`ring_kernel` for these queries: fast ones where the name has some, else written out.

    Args:
        q: queries ``[B, H, L, D]``.
        name: of the kernel.
        card: what ``sdpa`` goes by on a GPU; None looks at this machine.
    """
    if name == "math":
        return math_forward, math_backward
    if q.device.type == "cpu":
        return cpu_forward, cpu_backward
    if q.dtype not in HALF or q.shape[-1] % 8 or q.device.type not in ("cuda", "meta"):
        return math_forward, math_backward
    if name == "sdpa":
        name = "cudnn" if prefers_cudnn(card or Card.here()) else "flash2"
    if name == "cudnn" and q.shape[-1] <= MAX_HEAD_DIM:
        return cudnn_forward, cudnn_backward
    return cuda_forward, cuda_backward


def merge(total: Block | None, block: Block) -> Block:
    """Attention to the keys of both, in float32."""
    if total is None:
        return Block(block.out.to(block.lse.dtype), block.lse)
    lse = torch.logaddexp(total.lse, block.lse)
    old, new = (total.lse - lse).exp()[..., None], (block.lse - lse).exp()[..., None]
    return Block(total.out * old + block.out * new, lse)


class _Shift:
    """A tensor on its way to the next rank; :meth:`wait` gives the one that came from the rank before."""

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self.sent, self.received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        self.work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, group=axis.group, group_peer=after),
                dist.P2POp(dist.irecv, self.received, group=axis.group, group_peer=before),
            ]
        )

    def wait(self) -> Tensor:
        for work in self.work:
            work.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, lengths: list[int], axis: Axis, kernel: str) -> Tensor:
        attend, _ = block_kernels(q, kernel)
        total: Block | None = None
        extras, current = [], kv
        for step in range(axis.size):
            coming = _Shift(current, axis) if step < axis.size - 1 else None
            length = lengths[(axis.rank - step) % axis.size]
            extra = None
            if length:
                block, extra = attend(q, *current[:, :, :, :length].unbind())
                total = merge(total, block)
            extras.append(extra)
            current = coming.wait() if coming is not None else current
        assert total is not None  # some rank has a token
        out = total.out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, total.lse)
        ctx.lengths, ctx.axis, ctx.kernel, ctx.extras = lengths, axis, kernel, extras
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, kv, out, lse = ctx.saved_tensors
        axis, current = ctx.axis, kv
        _, backward = block_kernels(q, ctx.kernel)
        d_q = torch.zeros_like(q, dtype=lse.dtype)
        d_kv: _Shift | None = None  # of the block at hand, it travels with the block
        for step in range(axis.size):
            coming = _Shift(current, axis) if step < axis.size - 1 else None
            length = ctx.lengths[(axis.rank - step) % axis.size]
            mine = torch.zeros_like(kv, dtype=lse.dtype)
            if length:
                keys, values = current[:, :, :, :length].unbind()
                parts = backward(grad, q, keys, values, out, lse, ctx.extras[step])
                d_q += parts[0]
                mine[0, :, :, :length], mine[1, :, :, :length] = parts[1], parts[2]
            d_kv = _Shift(mine if d_kv is None else mine + d_kv.wait(), axis)
            current = coming.wait() if coming is not None else current
        assert d_kv is not None
        return d_q.to(q.dtype), d_kv.wait().to(kv.dtype), None, None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], axis: Axis, kernel: str = "sdpa") -> Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        q: ``[B, Lq, H, D]``.
        k, v: ``[B, Lk, H, D]``, equal Lk on all ranks; tokens past this rank's length are not attended.
        lengths: keys of each rank that count; at least one in all.
        axis: the ranks, more than one.
        kernel: see :func:`ring_kernel`.

    Returns:
        ``[B, Lq, H, D]``.
    """
    q = q.transpose(1, 2).contiguous()
    kv = torch.stack((k, v)).transpose(2, 3).contiguous()  # [2, B, H, Lk, D]
    return _RingAttention.apply(q, kv, lengths, axis, kernel).transpose(1, 2)
