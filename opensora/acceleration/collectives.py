"""Exchanges between ranks that autograd sees through. Without a group every one of them is the identity.

Gradients follow one convention: ranks that share a sample compute the same loss, and an average of the parameters'
gradients over all of them is the gradient of that loss. Engines that average over their ranks (DDP, FSDP, ZeRO) so
need not know which ranks share samples.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.acceleration.parallel_context import Axis


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return x.chunk(axis.size, dim)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.axis, ctx.dim) / ctx.axis.size, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank] * ctx.axis.size, None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, mean: bool) -> Tensor:
        ctx.axis, ctx.mean = axis, mean
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = all_reduce(grad, ctx.axis)
        return total / ctx.axis.size if ctx.mean else total, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.axis), None


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Equal shards of all ranks joined along ``dim``; not differentiable."""
    if axis.group is None:
        return x
    x = x.contiguous()
    out = torch.empty((axis.size, *x.shape), dtype=x.dtype, device=x.device)
    dist.all_gather(list(out.unbind()), x, group=axis.group)
    return torch.cat(out.unbind(), dim)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks, in a new tensor; not differentiable."""
    if axis.group is None:
        return x
    out = x.contiguous().clone()
    dist.all_reduce(out, group=axis.group)
    return out


def average(tensors: Sequence[Tensor], axis: Axis, bucket: int = 2**25) -> None:
    """Average tensors over ranks, in place, exchanged in buckets of about ``bucket`` elements."""
    if axis.group is None:
        return
    group: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        group.append(tensor)
        last = i == len(tensors) - 1
        if last or tensors[i + 1].dtype != tensor.dtype or sum(t.numel() for t in group) >= bucket:
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat, group=axis.group)
            for t, mean in zip(group, (flat / axis.size).split([t.numel() for t in group])):
                t.copy_(mean.view_as(t))
            group = []


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Fill ``x`` in place with what the rank ``source`` of the axis holds."""
    if axis.group is not None:
        dist.broadcast(x, group=axis.group, group_src=source)
    return x


def broadcast_object(value: Any, axis: Axis) -> Any:
    """What the first rank of the axis holds, on all of them; any picklable value."""
    if axis.group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=axis.group, group_src=0)
    return box[0]


def gather_values(value: Any, axis: Axis) -> list[Any]:
    """What every rank of the axis holds, by rank; any picklable value."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def to_first(x: Tensor, axis: Axis, source: int) -> Tensor:
    """What the rank ``source`` of the axis holds, on the first rank; all others get their own back.

    Args:
        x: that tensor on ``source``; on the first rank one of its shape and dtype, which is filled.
        axis: the ranks, all of which call this.
        source: one of them.
    """
    if axis.group is None or source == 0:
        return x
    if axis.rank == source:
        dist.send(x.contiguous(), group=axis.group, group_dst=0)
    elif axis.first:
        dist.recv(x, group=axis.group, group_src=source)
    return x


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of a tensor that all ranks hold, whose size along ``dim`` the axis divides."""
    return x if axis.group is None else _Split.apply(x, axis, dim)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Equal shards joined along ``dim``, on every rank; the inverse of `split`."""
    return x if axis.group is None else _Gather.apply(x, axis, dim)


def shared_mean(x: Tensor, axis: Axis) -> Tensor:
    """A tensor that all ranks hold, about to be used for their own tokens: its gradient is the average of theirs."""
    return x if axis.group is None else _Copy.apply(x, axis, True)


def shared_sum(x: Tensor, axis: Axis) -> Tensor:
    """A tensor that all ranks hold, about to be used with their own weights: its gradient is the sum of theirs."""
    return x if axis.group is None else _Copy.apply(x, axis, False)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum of the ranks' contributions, on every rank; the inverse of `shared_sum`."""
    return x if axis.group is None else _Reduce.apply(x, axis)


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Row j of ``x`` ``[size, ...]`` goes to rank j; row i of the result came from rank i."""
    return x if axis.group is None else _AllToAll.apply(x, axis)
