"""Exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.acceleration.sharding import Gathered
from opensora.training.weights.adapters import TrainedWeights


class HasStateDict(Protocol):
    """A model, or :class:`TrainedWeights`."""

    def state_dict(self) -> Mapping[str, Any]:
        """Weights by name."""


class EMA:
    """Average of a model's parameters and buffers, kept in float32 whatever the model trains in.

    ``average <- d * average + (1 - d) * weight`` once per optimizer step, with ``d = min(decay, (1 + n) / (10 + n))``
    so that a short run is not dominated by its initial weights.

    Args:
        model: the model (or part of one) to follow; its state-dict keys are the average's.
        decay: in [0, 1).
        axis: ranks that hold the same weights. Each averages an equal piece of every tensor, without an exchange; a
            tensor that is divided already is averaged as it is.
        device: where ranks exchange pieces; None where these are.

    Attributes:
        shadow: this rank's part of the average, by key; pieces are flat.
    """

    def __init__(
        self, model: HasStateDict, decay: float, axis: Axis | None = None, device: torch.device | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must lie in [0, 1)")
        self.decay, self.axis, self.device = decay, axis or Axis(), device
        self.updates = 0
        state = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
        self._shapes = {k: v.shape for k, v in state.items()}
        self.shadow = {k: self._piece(v).clone().float() for k, v in state.items()}

    def _piece(self, value: Tensor) -> Tensor:
        """This rank's part of a tensor; the last ranks' may be shorter, or empty."""
        if self.axis.group is None or isinstance(value, DTensor):
            return value
        size = -(-value.numel() // self.axis.size)
        return value.reshape(-1)[self.axis.rank * size : (self.axis.rank + 1) * size]

    def _whole(self, key: str, piece: Tensor) -> Tensor:
        """The tensor that pieces make; every rank calls it."""
        if self.axis.group is None or isinstance(piece, DTensor):
            return piece
        shape = self._shapes[key]
        size = -(-shape.numel() // self.axis.size)
        piece = torch.nn.functional.pad(piece, (0, size - piece.numel())).to(self.device or piece.device)
        pieces = collectives.all_gather(piece, self.axis)
        return pieces[: shape.numel()].view(shape)

    @torch.no_grad()
    def update(self, model: HasStateDict) -> None:
        """Take in the weights after one optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        keys = list(self.shadow)
        now = [self._piece(state[k].detach()).float() for k in keys]
        torch._foreach_lerp_([self.shadow[k] for k in keys], now, 1 - decay)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The averaged weights, under the model's keys; where ranks hold pieces, each is put together when it is read,
        by all ranks in the same order."""
        return self.shadow if self.axis.group is None else Gathered(self.shadow, self._whole)

    @contextmanager
    def shown(self, weights: TrainedWeights) -> Iterator[None]:
        """Within it, the model holds the average; afterwards its own weights again, bit for bit."""
        before = weights.show(self.state_dict())
        try:
            yield
        finally:
            weights.show(before)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a saved average; ``state`` has whole tensors, or such as are divided already."""
        for key, value in self.shadow.items():
            value.copy_(self._piece(state[key]))
        self.updates = updates
