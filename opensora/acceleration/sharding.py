"""Whole tensors from the parts that ranks hold, and back: what lets checkpoints pass from one layout to another."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis


@dataclass(frozen=True)
class Split:
    """How a weight is divided over tensor-parallel ranks.

    Attributes:
        dim: its divided dimension.
        parts: lengths of the projections fused along it; a rank holds its share of each, in this order.
    """

    dim: int
    parts: tuple[int, ...]

    def local(self, whole: Tensor, axis: Axis) -> Tensor:
        """This rank's part, a copy."""
        shares = [part.chunk(axis.size, self.dim)[axis.rank] for part in whole.split(self.parts, self.dim)]
        return torch.cat(shares, self.dim)

    def whole(self, local: Tensor, axis: Axis) -> Tensor:
        """The weight from all ranks' parts; every rank calls it."""
        shares = [part // axis.size for part in self.parts]
        ranks = [x.split(shares, self.dim) for x in collectives.all_gather(local[None], axis).unbind()]
        return torch.cat([share for part in zip(*ranks) for share in part], self.dim)


class Gathered(Mapping[str, Any]):
    """Whole tensors of a divided state, each put together when it is read, so that no rank holds all of them.

    Every rank must read the same ones in the same order.

    Args:
        parts: what this rank holds, by name.
        whole: from a name and its part to the whole.
    """

    def __init__(self, parts: Mapping[str, Any], whole: Callable[[str, Any], Any]) -> None:
        self._parts, self._whole = parts, whole

    def __getitem__(self, name: str) -> Any:
        return self._whole(name, self._parts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@dataclass(frozen=True)
class WeightLayout:
    """Which parameters of a model are divided over tensor-parallel ranks, and how.

    Attributes:
        axis: tensor-parallel ranks.
        splits: by parameter name; the others are whole on every rank.
    """

    axis: Axis = field(default_factory=Axis)
    splits: Mapping[str, Split] = field(default_factory=dict)

    def whole(self, name: str, value: Tensor) -> Tensor:
        """The whole of a parameter, or of something shaped like it; every rank calls it."""
        value = value.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if name in self.splits and value.ndim:
            value = self.splits[name].whole(value, self.axis)
        return value

    def part(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of a whole value, divided as ``like`` is: a plain tensor where ``whole`` is, and a view
        of it if it can be."""
        if name in self.splits and whole.ndim:
            whole = self.splits[name].local(whole, self.axis)
        if isinstance(like, DTensor):
            shape, start = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
            for dim, length in enumerate(shape):
                whole = whole.narrow(dim, start[dim] if length else 0, length)
        return whole

    def local(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """The same where ``like`` is and divided like it, in the dtype of ``whole``."""
        part = self.part(name, whole, like)
        if not isinstance(like, DTensor):
            return part.to(like.device)
        shape = like.shape[:1] + whole.shape[1:] if name in self.splits else whole.shape
        stride = torch.empty(shape, device="meta").stride()
        own = part.to(like.device, copy=True).contiguous()
        return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)

    @torch.no_grad()
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Fill a divided model with whole weights."""
        own = model.state_dict()
        for name in state:
            held_of(own[name]).copy_(self.part(name, state[name], own[name]))


def held_of(value: Tensor) -> Tensor:
    """The plain tensor that this rank holds of one that may be divided."""
    return value.to_local() if isinstance(value, DTensor) else value
