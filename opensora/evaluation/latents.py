"""Statistics of latents, gathered clip by clip."""

from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance per channel, combined batch by batch in float64 (Chan et al. 1983), so nothing cancels."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        """Take in latents ``[B, C, t, h, w]``."""
        values = z.detach().double().cpu().transpose(0, 1).flatten(1)
        mean = values.mean(dim=1)
        self._combine(values.shape[1], mean, (values - mean[:, None]).square().sum(dim=1))

    def merge(self, state: dict[str, Any]) -> None:
        """Take in what another one's `state` says."""
        mean, squares = (torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "squares"))
        self._combine(int(state["count"]), mean, squares)

    def _combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * count / total
        self.squares = self.squares + squares + delta.square() * self.count * count / total
        self.count = total

    def state(self) -> dict[str, Any]:
        """Count, means and sums of squared deviations, as plain numbers."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel."""
        return (self.squares / self.count).sqrt()

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation over all channels together."""
        mean = self.mean.mean()
        variance = (self.squares / self.count).mean() + (self.mean - mean).square().mean()
        return float(mean), float(variance.sqrt())
