"""Clips that show the same thing, whatever their size and compression."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import polars as pl

from opensora.config.options import Options, opt
from tools.data.engine.stage import TableStage

BANDS, BAND_BITS = 8, 8
BLOCK = 2048  # rows of a block of similarities


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions(Options):
    """Clips that show the same."""

    max_distance: float = opt(
        6.0, "mean distance of perceptual hashes up to which clips are the same", "bits of 64", least=0, most=64
    )
    min_cosine: float = opt(
        0.98, "cosine of CLIP features from which they are, where the chain has stage clip", above=0, most=1
    )


class Duplicates(TableStage):
    """The best clip of every group of equal ones stays in; ``duplicate_of`` of the others names it."""

    settings: DuplicatesOptions

    name = "duplicates"
    version = 1
    reads = ("clip_id", "phash", "height", "width")
    adds: ClassVar = {"duplicate_of": pl.String, "keep": pl.Boolean, "reason": pl.String}

    def run_table(self, table: pl.DataFrame) -> pl.DataFrame:
        """Group, and choose one of each group."""
        groups = _Groups(table.height)
        hashes = table["phash"].to_list()
        for count in {len(h) for h in hashes}:
            rows = np.array([i for i, h in enumerate(hashes) if len(h) == count])
            values = np.array([[int(h, 16) for h in hashes[i]] for i in rows], np.uint64)
            for a, b in close_hashes(values, self.settings.max_distance):
                groups.unite(int(rows[a]), int(rows[b]))
        if "clip_features" in table.columns and table.height:
            features = np.array(table["clip_features"].to_list(), np.float32)
            ratio = (table["height"] / table["width"]).to_numpy()
            for a, b in close_features(features, self.settings.min_cosine):
                if abs(ratio[a] / ratio[b] - 1) < 0.02:
                    groups.unite(a, b)
        best = self._best(table, groups)
        ids = table["clip_id"].to_list()
        of = [None if best[i] == i else ids[best[i]] for i in range(table.height)]
        return table.with_columns(
            pl.Series("duplicate_of", of, pl.String),
            pl.Series("keep", [o is None for o in of], pl.Boolean),
            pl.Series("reason", ["" if o is None else "duplicate" for o in of], pl.String),
        )

    @staticmethod
    def _best(table: pl.DataFrame, groups: "_Groups") -> list[int]:
        """For every row the one that stands for its group: the best (see :func:`worth`), of equal ones the first."""
        values = worth(table)
        best: dict[int, int] = {}
        for row in range(table.height):
            root = groups.find(row)
            if values[row] > values[best.setdefault(root, row)]:
                best[root] = row
        return [best[groups.find(row)] for row in range(table.height)]


def worth(table: pl.DataFrame) -> list[tuple[float, ...]]:
    """What makes a clip better than another that shows the same: resolution, then length, then bit rate of its source.

    Columns that a table lacks count nothing, nor do values that are not known.
    """
    names = ("num_frames", "fps", "bpp", "source_height", "source_width", "source_fps")
    table = table.with_columns(pl.lit(None, pl.Float64).alias(name) for name in names if name not in table.columns)
    area = pl.col("height").cast(pl.Float64) * pl.col("width")
    seconds = (pl.col("num_frames") / pl.col("fps")).round(2)
    source = [pl.col(name).cast(pl.Float64).fill_null(1.0) for name in ("source_height", "source_width", "source_fps")]
    bits = pl.col("bpp") * source[0] * source[1] * source[2]
    return table.select(area.alias("a"), seconds.alias("s"), bits.alias("b")).fill_null(0.0).rows()


class _Groups:
    """Union-find."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = item = self.parent[self.parent[item]]
        return item

    def unite(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


def close_hashes(hashes: np.ndarray, max_distance: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose 64-bit hashes differ by at most ``max_distance`` bits on average.

    Args:
        hashes: uint64 [N, F], F hashes per row.
        max_distance: mean over F.

    Where the mean is at most d, one of the F hashes differs by at most d bits; those fall into at most d of eight bands
    of eight bits, so 8 - d bands are equal. With d = 6 only rows that share two bands need be compared, one in 65,536
    by chance.
    """
    unique, inverse = np.unique(hashes, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.argsort(inverse, kind="stable")
    first = order[np.searchsorted(inverse[order], np.arange(len(unique)))]
    for row, group in enumerate(inverse):
        if first[group] != row:
            yield int(first[group]), row
    equal = min(max(BANDS - int(max_distance), 0), 2)
    for column in unique.T:
        bands = [(column >> np.uint64(BAND_BITS * band)) & np.uint64(255) for band in range(BANDS)]
        for chosen in combinations(range(BANDS), equal):
            key = np.zeros(len(unique), np.uint64)
            for band in chosen:
                key = key << np.uint64(BAND_BITS) | bands[band]
            for members in _buckets(key):
                for a, b in _compare(unique, members, max_distance):
                    yield int(first[a]), int(first[b])


def _buckets(key: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with equal keys, two or more."""
    order = np.argsort(key, kind="stable")
    edges = np.flatnonzero(np.diff(key[order])) + 1
    yield from (members for members in np.split(order, edges) if len(members) > 1)


def _compare(hashes: np.ndarray, members: np.ndarray, max_distance: float) -> Iterator[tuple[int, int]]:
    for place, row in enumerate(members[:-1]):
        rest = members[place + 1 :]
        distance = np.bitwise_count(hashes[rest] ^ hashes[row]).mean(axis=1)
        for other in rest[distance <= max_distance]:
            yield int(row), int(other)


def close_features(features: np.ndarray, min_cosine: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose features [N, D] have at least this cosine."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    for start in range(0, len(unit), BLOCK):
        for other in range(start, len(unit), BLOCK):
            close = unit[start : start + BLOCK] @ unit[other : other + BLOCK].T >= min_cosine
            for a, b in zip(*np.nonzero(close)):
                if start + a < other + b:
                    yield int(start + a), int(other + b)
