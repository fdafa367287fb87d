"""What training asks of the machinery that holds model and optimizer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opensora.acceleration.parallel_context import Axis


class Engine(Protocol):
    """Model and optimizer behind one interface, however they are sharded.

    ``model`` is what a forward pass calls. Every rank calls every method, in the same order.
    """

    model: nn.Module
    optimizer: Optimizer
    rounded_to: torch.dtype | None
    """dtype that the forward pass sees, where the engine keeps float32 weights beside it."""
    ranks: Axis
    """All processes, for what they exchange beside training (`ParallelContext.host`)."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch."""

    def no_sync(self) -> AbstractContextManager:
        """Within it, backward passes do not exchange gradients (accumulation)."""

    def step(self) -> float:
        """Clip, update the weights if all gradients are finite, clear them; returns the gradient norm."""

    def unwrap(self) -> nn.Module:
        """The plain model; its state dict has the keys of one process, its tensors may be sharded."""

    def gather(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole tensors of a state dict like the model's, each put together when it is read: every rank must read
        the same ones in the same order."""

    def scatter(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """This rank's part of whole tensors, by the model's keys: the inverse of `gather`. ``like`` says how tensors of
        other names are divided."""

    def state_dict(self) -> Mapping[str, Any]:
        """Optimizer state, whole, as one process would save it; tensors are read as those of `gather`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Optimizer state of an earlier run, under whatever engine."""

    def master_state(self) -> Mapping[str, Tensor]:
        """Whole float32 weights, where the engine keeps some beside those of the forward pass (``rounded_to``), read
        as those of `gather`; empty where not."""

    def load_master_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from whole float32 weights; nothing where the engine keeps none."""

    def on_any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank: the same answer for all."""


class SingleEngine:
    """One process, one device.

    Args:
        model: trained in place.
        optimizer: over the model's trainable parameters.
        max_norm: limit of the gradient norm, 0 for none.
    """

    rounded_to: torch.dtype | None = None
    ranks = Axis()

    def __init__(self, model: nn.Module, optimizer: Optimizer, max_norm: float = 0.0) -> None:
        self.model, self.optimizer, self.max_norm = model, optimizer, max_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self) -> AbstractContextManager:
        """Nothing is exchanged on one device."""
        return nullcontext()

    def step(self) -> float:
        norm = self._clip()
        if torch.isfinite(torch.tensor(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> float:
        """Scale gradients down to ``max_norm``; returns their norm before."""
        limit = self.max_norm if self.max_norm > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))

    def unwrap(self) -> nn.Module:
        return self.model

    def gather(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return state

    def scatter(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return dict(state)

    def state_dict(self) -> Mapping[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(state))

    def master_state(self) -> Mapping[str, Tensor]:
        return {}

    def load_master_state(self, state: Mapping[str, Tensor]) -> None:
        """There are none."""

    def on_any_rank(self, flag: bool) -> bool:
        return flag
