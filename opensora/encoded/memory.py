"""Encoder outputs that stay in memory, so that every clip and caption of a small dataset is encoded once."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from opensora.datasets.source import SampleKey


class EncodedMemory:
    """Named tensors by key, computed when a key is first asked for.

    They are computed in groups of a fixed size. The last bits of an encoder's output may depend on how many samples it
    works on at a time, and which of a batch's samples are missing depends on where a run was resumed: with groups of
    one size, a sample's output depends on the sample alone.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, dict[str, Tensor]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def is_encoded(self, key: SampleKey) -> bool:
        """Whether the clip of a key is kept, by (row, frames, height, width)."""
        return key[:4] in self._kept

    def __call__(
        self, keys: Sequence[Hashable], compute: Callable[[list[int]], dict[str, Tensor]], group: int
    ) -> dict[str, Tensor]:
        """Stacked tensors of ``keys`` by name.

        Args:
            keys: one per sample; the same key stands for the same sample.
            compute: from ``group`` positions in ``keys`` to their tensors ``[group, ...]`` by name.
            group: samples computed at a time.
        """
        missing = {key: position for position, key in enumerate(keys) if key not in self._kept}
        for positions in fixed_groups(list(missing.values()), group):
            made = compute(positions)
            for row, position in enumerate(positions):
                self._kept[keys[position]] = {name: tensor[row].clone() for name, tensor in made.items()}
        found = [self._kept[key] for key in keys]
        return {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}


def fixed_groups(positions: list[int], size: int) -> Iterator[list[int]]:
    """``positions`` in groups of exactly ``size``; the last one is filled up with its last position."""
    for first in range(0, len(positions), size):
        group = positions[first : first + size]
        yield group + [group[-1]] * (size - len(group))


def even_group(count: int, limit: int) -> int:
    """Size of the fewest equal groups of at most ``limit`` that ``count`` samples are divided into."""
    return math.ceil(count / math.ceil(count / limit))
