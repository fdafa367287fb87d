"""Whole tensors from the parts that ranks hold, and back: what lets checkpoints pass from one layout to another."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

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

    def local(self, name: str, whole: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of a whole value, divided as ``like`` is, in the dtype of ``whole``."""
        if name in self.splits and whole.ndim:
            whole = self.splits[name].local(whole, self.axis)
        if isinstance(like, DTensor):
            return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return whole.to(like.device)

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Fill a divided model with whole weights."""
        with torch.no_grad():
            own = model.state_dict()
            for name, value in [(name, own[name]) for name in state]:
                value.copy_(self.local(name, state[name].to(value.dtype), value))
