"""What training asks of the machinery that holds model and optimizer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Engine(Protocol):
    """Model and optimizer behind one interface, however they are sharded."""

    model: nn.Module
    optimizer: Optimizer

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch."""

    def no_sync(self) -> AbstractContextManager:
        """Within it, backward passes do not exchange gradients (accumulation)."""

    def step(self) -> float:
        """Clip, update the weights if all gradients are finite, clear them; returns the gradient norm."""

    def unwrap(self) -> nn.Module:
        """The plain model."""

    def state_dict(self) -> Mapping[str, Any]:
        """Optimizer state, whole."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Optimizer state of an earlier run."""


class SingleEngine:
    """One process, one device.

    Args:
        model: trained in place.
        optimizer: over the model's trainable parameters.
        max_norm: limit of the gradient norm, 0 for none.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, max_norm: float = 0.0) -> None:
        self.model, self.optimizer, self.max_norm = model, optimizer, max_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        loss.backward()

    def no_sync(self) -> AbstractContextManager:
        """See :class:`Engine`; nothing is exchanged on one device."""
        return nullcontext()

    def step(self) -> float:
        """See :class:`Engine`."""
        limit = self.max_norm if self.max_norm > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        if torch.isfinite(torch.tensor(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def unwrap(self) -> nn.Module:
        """See :class:`Engine`."""
        return self.model

    def state_dict(self) -> Mapping[str, Any]:
        """See :class:`Engine`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Engine`."""
        self.optimizer.load_state_dict(dict(state))
