"""Exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

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
    """

    def __init__(self, model: HasStateDict, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.shadow = {k: v.detach().clone().float() for k, v in model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, model: HasStateDict) -> None:
        """Take in the weights after one optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        keys = list(self.shadow)
        torch._foreach_lerp_([self.shadow[k] for k in keys], [state[k].float() for k in keys], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's keys."""
        return self.shadow

    @contextmanager
    def shown(self, weights: TrainedWeights) -> Iterator[None]:
        """Within it, the model holds the average; afterwards its own weights again, bit for bit."""
        before = weights.show(self.shadow)
        try:
            yield
        finally:
            weights.show(before)

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Go on from a saved average."""
        for key, value in self.shadow.items():
            value.copy_(state[key])
        self.updates = updates
