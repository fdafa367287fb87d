"""Videos of two settings, paired by prompt and seed: how far apart they are, and what each measure says of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from opensora.datasets.transforms import to_model_range
from opensora.evaluation.quality import psnr, ssim
from opensora.utils.errors import UserError, shorten
from opensora.utils.progress import Bar
from tools.evaluate.intervals import mean_interval
from tools.evaluate.measures import MEASURES, measure_clip
from tools.evaluate.samples import Frames, Sample

PEAK_DB = 99.0  # of equal clips, in place of an infinite one that no mean could hold
LPIPS_FRAMES = 16  # at a time


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt and seed.

    Attributes:
        name: of the pair, its number.
        first, second: the samples.
    """

    name: str
    first: Sample
    second: Sample

    @property
    def prompt(self) -> str:
        """What both show."""
        return self.first.prompt


def make_pairs(first: Sequence[Sample], second: Sequence[Sample]) -> tuple[list[Pair], list[str]]:
    """Pair samples by prompt and seed where both are recorded, by file name elsewhere; also names left over.

    Raises:
        UserError: nothing pairs, or files of one name were made with different prompts or seeds.
    """
    others, left = {_key(sample): sample for sample in second}, []
    by_name = {sample.name: sample for sample in second}
    pairs: list[Pair] = []
    for sample in first:
        other = others.pop(_key(sample), None)
        if other is None:
            left.append(sample.name)
            same = by_name.get(sample.name)
            if same is not None and sample.record and same.record:
                raise UserError(
                    f"{sample.path} and {same.path} have other prompts or seeds ({sample.prompt!r}, {sample.seed}; "
                    f"{same.prompt!r}, {same.seed}): make both with the same --dataset.data-path and seeds"
                )
            continue
        pairs.append(Pair(f"{len(pairs):04d}", sample, other))
    left += [sample.name for sample in others.values()]
    if not pairs:
        raise UserError(f"no video of one folder has its like in the other ({shorten(left)})")
    return pairs, left


def _key(sample: Sample) -> tuple[Any, ...]:
    return (sample.name,) if sample.seed is None else (sample.prompt, sample.seed)


def distances(first: Frames, second: Frames, lpips: nn.Module | None, device: str) -> dict[str, float]:
    """PSNR in dB, SSIM and LPIPS between two clips of one size.

    Raises:
        UserError: their sizes differ.
    """
    if first.shape != second.shape:
        raise UserError(f"sizes differ: {list(first.shape)} and {list(second.shape)}; compare videos of one size")
    found = {"psnr": min(psnr(first, second), PEAK_DB), "ssim": ssim(first, second)}
    if lpips is not None:
        found["lpips"] = perceptual(first, second, lpips, device)
    return found


@torch.no_grad()
def perceptual(first: Frames, second: Frames, lpips: nn.Module, device: str) -> float:
    """Mean LPIPS of the frames."""
    total = 0.0
    for start in range(0, len(first), LPIPS_FRAMES):
        chosen = slice(start, start + LPIPS_FRAMES)
        a, b = (to_model_range(clip[chosen]).transpose(0, 1).to(device) for clip in (first, second))
        total += float(lpips(a, b).double().sum())
    return total / len(first)


def measure_pairs(pairs: Sequence[Pair], lpips: nn.Module | None = None, device: str = "cpu") -> pd.DataFrame:
    """A row per pair: distances, each measure of both (``sharpness_a``, ``sharpness_b``), and seconds where recorded.

    Raises:
        UserError: a file cannot be read, or sizes differ; names the pair.
    """
    rows = []
    for pair in Bar(pairs, unit="pair"):
        (first, fps), (second, _) = pair.first.read(), pair.second.read()
        row: dict[str, Any] = {"pair": pair.name, "prompt": pair.prompt, "seed": pair.first.seed}
        row |= {"a": str(pair.first.path), "b": str(pair.second.path)}
        try:
            row |= distances(first, second, lpips, device)
        except UserError as error:
            raise UserError(f"{pair.first.path} and {pair.second.path}: {error}") from None
        for side, frames, sample in (("a", first, pair.first), ("b", second, pair.second)):
            row |= {f"{name}_{side}": value for name, value in measure_clip(frames, fps).items()}
            row |= {f"seconds_{side}": seconds} if (seconds := _seconds(sample)) else {}
        rows.append(row)
    return pd.DataFrame(rows)


def _seconds(sample: Sample) -> float:
    """What a sample took to make, as recorded; 0 if it was not."""
    stages = sample.record.get("seconds")
    return float(sum(stages.values())) if isinstance(stages, dict) else 0.0


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Per measure the means of both settings, and the mean difference (second less first) with its interval.

    ``sure`` says which way the interval points, in words of the measure: better, worse, more, less, or nothing.
    """
    found = []
    for name in [*MEASURES, "seconds"]:
        if f"{name}_a" not in rows or f"{name}_b" not in rows:
            continue
        a, b = rows[f"{name}_a"], rows[f"{name}_b"]
        there = a.notna() & b.notna()
        if not there.any():
            continue
        interval = mean_interval((b - a)[there].to_numpy(np.float64))
        row = {"measure": name, "pairs": int(there.sum()), "a": a[there].mean(), "b": b[there].mean()}
        row |= {"difference": interval.mean, "low": interval.low, "high": interval.high}
        found.append({**row, "sure": _words(name, interval.mean) if interval.excludes_zero else ""})
    for name in ("psnr", "ssim", "lpips"):
        if name in rows:
            interval = mean_interval(rows[name].to_numpy(np.float64))
            row = {"measure": f"{name} between the two", "pairs": len(rows), "difference": interval.mean}
            found.append({**row, "low": interval.low, "high": interval.high, "sure": ""})
    return pd.DataFrame(found)


def _words(name: str, difference: float) -> str:
    better = "low" if name == "seconds" else MEASURES[name].better
    if not better:
        return "more" if difference > 0 else "less"
    return "better" if (difference > 0) == (better == "high") else "worse"
