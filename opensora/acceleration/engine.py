"""What training asks of the machinery that holds model and optimizer."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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

    def scatter(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """This rank's part of whole tensors, by the model's keys, each made when it is read: the inverse of `gather`.
        ``like`` says how tensors of other names are divided."""

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

    def scatter(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        return state

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


class UpdatesOne(Protocol):
    """An optimizer that can update one of its parameters alone."""

    param_groups: list[dict[str, Any]]

    def update(self, parameter: nn.Parameter) -> None:
        """Update a parameter by its gradient."""

    def finish(self) -> None:
        """All updates of a step are done."""


class ReleasingEngine(SingleEngine):
    """One process, one device, where the backward pass updates each parameter once its gradient is there, and frees
    that (gradient release, arXiv:2306.09782): there is never more than one gradient.

    So there is one micro-batch a step, and the norm of all gradients is known too late to clip them. Where the loss is
    not finite, nothing is updated; of gradients that are not, their parameters alone are left as they are.

    Args:
        model: trained in place.
        optimizer: over ``named``, see :class:`UpdatesOne`.
        named: trainable parameters by the model's names, or copies of them, to which their gradients are moved.
    """

    def __init__(self, model: nn.Module, optimizer: Any, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        super().__init__(model, optimizer)
        self._updates: UpdatesOne = optimizer
        self._squares: list[float] = []
        self._in_backward = False
        updated = dict(named)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._release, updated[name]))

    def backward(self, loss: Tensor) -> None:
        if not math.isfinite(float(loss.detach())):
            self._squares.append(math.nan)
            return
        self._in_backward = True
        try:
            loss.backward()
        finally:
            self._in_backward = False

    def _release(self, updated: nn.Parameter, parameter: Tensor) -> None:
        """A parameter has its gradient. Backward passes of other engines may come through the model too."""
        if not self._in_backward:
            return
        assert updated.grad is not None
        norm = float(torch.linalg.vector_norm(updated.grad, dtype=torch.float32))
        self._squares.append(norm**2)
        if math.isfinite(norm):
            self._updates.update(updated)
        updated.grad = None

    def step(self) -> float:
        """What the backward pass has left to do: returns the norm of its gradients."""
        self._updates.finish()
        norm, self._squares = math.sqrt(sum(self._squares)), []
        self.optimizer.zero_grad(set_to_none=True)
        return norm
