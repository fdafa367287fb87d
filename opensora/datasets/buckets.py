"""Buckets: which (resolution, number of frames, aspect ratio) every row of a dataset is trained at.

A bucket config reads ``{resolution: {num_frames: (probability, batch_size)}}``, where the probability may be a pair
``(keep, skip)``: with probability ``skip`` a clip goes on to a shorter length, otherwise it is kept with ``keep``.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from opensora.datasets.aspect import resolution_table
from opensora.utils.errors import UserError

MIN_AREA_SHARE = 0.8  # a clip may be enlarged to this share of its area at most


@dataclass(frozen=True)
class Bucket:
    """One training size: micro-batches hold ``batch_size`` clips of the same ``(num_frames, height, width)``."""

    resolution: str
    num_frames: int
    ratio: str
    height: int
    width: int
    batch_size: int


@dataclass(frozen=True)
class _Length:
    num_frames: int
    keep: float
    skip: float
    batch_size: int


def _parse_lengths(resolution: str, lengths: Mapping) -> list[_Length]:
    parsed = []
    for frames, value in lengths.items():
        try:
            prob, batch_size = value
            keep, skip = prob if isinstance(prob, tuple | list) else (prob, 0.0)
            entry = _Length(_whole(frames), float(keep), float(skip), _whole(batch_size))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"bucket_config[{resolution!r}][{frames!r}] = {value!r}: expected (probability, batch_size) or "
                "((keep, skip), batch_size)"
            ) from error
        if entry.num_frames < 1 or entry.batch_size < 1 or not 0 <= entry.keep <= 1 or not 0 <= entry.skip <= 1:
            raise UserError(
                f"bucket_config[{resolution!r}][{frames!r}] = {value!r}: frames and batch size must be at least 1, "
                "probabilities within 0 and 1"
            )
        parsed.append(entry)
    return sorted(parsed, key=lambda entry: -entry.num_frames)


def _whole(number: float) -> int:
    """A whole number; raises a ValueError for another."""
    if int(number) != number:
        raise ValueError(number)
    return int(number)


class BucketTable:
    """All buckets of a config, and the assignment of rows to them.

    Args:
        buckets: see the module.
        multiple: heights and widths are multiples of this many pixels (VAE compression times patch size).

    Raises:
        UserError: unknown resolution name or malformed entry.
    """

    def __init__(self, buckets: Mapping[str, Mapping], multiple: int = 16) -> None:
        if not buckets:
            raise UserError("bucket_config is empty: give {resolution: {num_frames: (probability, batch_size)}}")
        levels = [(name, *resolution_table(name, multiple), _parse_lengths(name, buckets[name])) for name in buckets]
        self.levels = sorted(levels, key=lambda level: -level[1])
        self.buckets = [
            Bucket(name, length.num_frames, ratio, *size, length.batch_size)
            for name, _, ratios, lengths in self.levels
            for length in lengths
            for ratio, size in ratios.items()
        ]
        if not self.buckets:
            named = ", ".join(map(str, buckets))
            raise UserError(f"bucket_config: {named} without a length: {{num_frames: (probability, batch_size)}}")
        self._ids = {(b.resolution, b.num_frames, b.ratio): i for i, b in enumerate(self.buckets)}

    def assign(self, table: pd.DataFrame, strides: np.ndarray, seed: int) -> np.ndarray:
        """Bucket number of every row, -1 where none fits.

        Resolutions are tried from large to small and skipped where the clip has less than 0.8 of their pixels; within
        one, lengths from long to short. A length that is not kept ends the search at this resolution.

        Args:
            table: columns num_frames, height, width.
            strides: distance between the frames taken of each row, ``[N]``.
            seed: of the random choices.
        """
        frames, height, width = _sizes(table, strides)
        rng = np.random.default_rng(seed)
        result = np.full(len(table), -1, dtype=np.int64)
        for name, pixels, ratios, lengths in self.levels:
            searching = (result < 0) & (height * width >= MIN_AREA_SHARE * pixels)
            nearest = _nearest_ratio(height / width, list(ratios))
            for length in lengths:
                fits = frames == 1 if length.num_frames == 1 else frames >= length.num_frames
                # A video never becomes a picture unless the config has nothing but pictures at this resolution.
                if length.num_frames == 1 and len(lengths) == 1:
                    fits = frames >= 1
                passed_on, kept = rng.random(len(table)) < length.skip, rng.random(len(table)) < length.keep
                reached = searching & fits & ~passed_on
                ids = np.array([self._ids[name, length.num_frames, ratio] for ratio in ratios])
                result = np.where(reached & kept, ids[nearest], result)
                searching &= ~reached
        return result

    def shrunk(self, assigned: np.ndarray, replicas: int) -> "BucketTable":
        """A copy whose buckets have a full batch for each of ``replicas`` ranks, as far as they have clips enough.

        Args:
            assigned: bucket number of every row, -1 where none fits.
        """
        counts = np.bincount(assigned[assigned >= 0], minlength=len(self.buckets)).tolist()
        table = copy.copy(self)
        table.buckets = [
            replace(bucket, batch_size=max(min(bucket.batch_size, count // replicas), 1))
            for bucket, count in zip(self.buckets, counts)
        ]
        return table

    def lonely(self, assigned: np.ndarray) -> dict[Bucket, int]:
        """Buckets with fewer clips than a batch, and how many they have."""
        counts = np.bincount(assigned[assigned >= 0], minlength=len(self.buckets)).tolist()
        return {bucket: count for bucket, count in zip(self.buckets, counts) if 0 < count < bucket.batch_size}

    def describe(self, assigned: np.ndarray) -> str:
        """Printable table of buckets in use, with clips and micro-batches, and the number of unused rows."""
        counts = np.bincount(assigned[assigned >= 0], minlength=len(self.buckets))
        lines = [f"{'resolution':>14} {'frames':>6} {'ratio':>7} {'size':>11} {'batch':>5} {'clips':>9} {'batches':>8}"]
        for bucket, count in zip(self.buckets, counts):
            if count:
                lines.append(
                    f"{bucket.resolution:>14} {bucket.num_frames:>6} {bucket.ratio:>7} "
                    f"{f'{bucket.height}x{bucket.width}':>11} {bucket.batch_size:>5} {count:>9} "
                    f"{count // bucket.batch_size:>8}"
                )
        used = int((assigned >= 0).sum()) - sum(self.lonely(assigned).values())
        lines.append(f"{used} of {len(assigned)} rows are used")
        return "\n".join(lines)

    def explain(self, table: pd.DataFrame, strides: np.ndarray, assigned: np.ndarray) -> str:
        """Why rows are in no bucket, or in one without a full batch: a line per reason, with the number of rows.

        Args:
            table, strides: as for :meth:`assign`.
            assigned: what it returned.
        """
        frames, height, width = _sizes(table, strides)
        fits_size, fits_length = np.zeros(len(table), dtype=bool), np.zeros(len(table), dtype=bool)
        for _, pixels, _, lengths in self.levels:
            large = height * width >= MIN_AREA_SHARE * pixels
            fits_size |= large
            shortest = min(length.num_frames for length in lengths)
            videos = min((length.num_frames for length in lengths if length.num_frames > 1), default=1)
            fits_length |= large & ((frames == 1) & (shortest == 1) | (frames > 1) & (frames >= videos))
        unused = assigned < 0
        counts = np.bincount(assigned[~unused], minlength=len(self.buckets))
        lonely = sum(self.lonely(assigned).values())
        left_over = sum(int(count) % bucket.batch_size for bucket, count in zip(self.buckets, counts)) - lonely
        smallest, shortest = self.levels[-1][0], min(length.num_frames for *_, ls in self.levels for length in ls)
        reasons = {
            f"have less than {MIN_AREA_SHARE:g} of the pixels of {smallest}": int((unused & ~fits_size).sum()),
            f"fit no length at their size (after striding to fps_max; the shortest is {shortest})": int(
                (unused & fits_size & ~fits_length).sum()
            ),
            "were not kept by the probabilities": int((unused & fits_size & fits_length).sum()),
            "are fewer than a batch of their bucket, which is left out": lonely,
            "do not fill a batch of their bucket and wait for another epoch": left_over,
        }
        return "\n".join(f"{count:>9} rows {reason}" for reason, count in reasons.items() if count)

    def find(self, num_frames: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Number of the first bucket of each size, -1 where there is none."""
        numbers = {}
        for number, bucket in reversed(list(enumerate(self.buckets))):
            numbers[bucket.num_frames, bucket.height, bucket.width] = number
        result = np.full(len(num_frames), -1, dtype=np.int64)
        for (t, h, w), number in numbers.items():
            result[(num_frames == t) & (height == h) & (width == w)] = number
        return result


def _sizes(table: pd.DataFrame, strides: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames after striding, height and width of every row."""
    frames = table["num_frames"].to_numpy(dtype=np.int64)
    height, width = (table[c].to_numpy(dtype=np.float64) for c in ("height", "width"))
    return np.where(frames > 1, frames // strides, frames), height, width


def _nearest_ratio(ratios: np.ndarray, names: list[str]) -> np.ndarray:
    """Index into ``names`` ("width:height") of the ratio nearest to each height / width."""
    nearest = np.zeros(len(ratios), dtype=np.int16)
    least = np.full(len(ratios), np.inf)
    for number, name in enumerate(names):  # one name at a time: a table of all distances would be 100 MB
        w, h = map(float, name.split(":"))
        distance = np.abs(ratios - h / w)
        closer = distance < least
        nearest[closer], least[closer] = number, distance[closer]
    return nearest
