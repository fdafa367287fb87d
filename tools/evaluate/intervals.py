"""How sure a difference is: bootstrap intervals of paired samples, and win rates of votes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the range that holds the true one with 95 % confidence; NaN ends where it cannot be told."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is sure."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float] | FloatArray, seed: int = 0) -> Interval:
    """Mean of values (differences of pairs) with its bias-corrected bootstrap interval (Efron 1987).

    Args:
        values: one per pair.
        seed: of the resampling, so that the same values have the same interval.
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, float("nan"), float("nan"))
    if np.ptp(array) <= 1e-12 * max(abs(mean), 1.0):  # nothing to resample
        return Interval(mean, mean, mean)
    for method in ("BCa", "percentile"):  # the former has no answer for some degenerate samples
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            generator = np.random.default_rng(seed)
            found = stats.bootstrap(
                (array,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method=method, rng=generator
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return Interval(mean, float(found.low), float(found.high))


@dataclass(frozen=True)
class WinRate:
    """How often the second of two settings was preferred.

    Attributes:
        wins, losses, ties: votes.
        rate: share of pairs won; a tie is half of one. Each pair counts once, however many people saw it.
        p: of the sign test: how likely votes this uneven are where neither setting is better (ties left out).
    """

    wins: int
    losses: int
    ties: int
    rate: Interval
    p: float


def win_rate(outcomes: Sequence[tuple[str, float]], seed: int = 0) -> WinRate:
    """Win rate from votes.

    Args:
        outcomes: (pair, 1 for a win, 0.5 for a tie, 0 for a loss). Votes of several people on a pair are averaged
            first: they are not independent.
        seed: of the resampling.
    """
    pairs: dict[str, list[float]] = {}
    for pair, outcome in outcomes:
        pairs.setdefault(pair, []).append(outcome)
    means = [float(np.mean(found)) for found in pairs.values()]
    wins, losses, ties = (sum(outcome == value for _, outcome in outcomes) for value in (1.0, 0.0, 0.5))
    won, lost = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    interval = mean_interval(means, seed)
    if interval.low == interval.high and interval.mean in (0.0, 1.0):  # all alike: resampling sees no doubt
        found = stats.binomtest(won, len(means)).proportion_ci(CONFIDENCE, "wilson")
        interval = Interval(interval.mean, float(found.low), float(found.high))
    return WinRate(wins, losses, ties, interval, p)
