"""Encoder outputs that stay in memory, so that every clip and caption of a small dataset is encoded once."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from opensora.datasets.source import SampleKey
from opensora.utils.logging import get_logger
from opensora.utils.sizes import size_text

logger = get_logger(__name__)


class HostRoom:
    """Bytes of host memory that may be filled; what does not fit any more is refused, which the log says once.

    Args:
        limit: bytes; None for as many as there are.
        key: where the limit stands, for the log.

    Attributes:
        used: bytes that are filled.
    """

    def __init__(self, limit: int | None = None, key: str = "keep_encoded_memory") -> None:
        self.limit, self.key, self.used = limit, key, 0
        self._told = False

    def take(self, count: int) -> bool:
        """Whether there is room for so many bytes more, which is then filled."""
        if self.limit is not None and self.used + count > self.limit:
            if not self._told:
                logger.warning(
                    "%s=%s is filled: what has come so far is kept, all else is read and encoded every time",
                    *(self.key, size_text(self.limit)),
                )
            self._told = True
            return False
        self.used += count
        return True


class EncodedMemory:
    """Named tensors by key, computed when a key is first asked for, and kept in host memory as long as there is room.

    They are computed in groups of a fixed size. The last bits of an encoder's output may depend on how many samples it
    works on at a time, and which of a batch's samples are missing depends on where a run was resumed: with groups of
    one size, a sample's output depends on the sample alone.

    Args:
        room: may be shared by several memories; None is without limit.
        device: where tensors are wanted; None is the CPU.
    """

    def __init__(self, room: HostRoom | None = None, device: torch.device | None = None) -> None:
        self.room, self.device = room or HostRoom(), device
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
        new: dict[Hashable, dict[str, Tensor]] = {}
        for positions in fixed_groups(list(missing.values()), group):
            made = {name: tensor.cpu() for name, tensor in compute(positions).items()}
            for row, position in enumerate(positions):
                new[keys[position]] = {name: tensor[row].clone() for name, tensor in made.items()}
        for key, tensors in new.items():
            if self.room.take(sum(tensor.nbytes for tensor in tensors.values())):
                self._kept[key] = tensors
        found = [self._kept.get(key) or new[key] for key in keys]
        return {name: torch.stack([tensors[name] for tensors in found]).to(device=self.device) for name in found[0]}


def fixed_groups(positions: list[int], size: int) -> Iterator[list[int]]:
    """``positions`` in groups of exactly ``size``; the last one is filled up with its last position."""
    for first in range(0, len(positions), size):
        group = positions[first : first + size]
        yield group + [group[-1]] * (size - len(group))


def even_group(count: int, limit: int) -> int:
    """Size of the fewest equal groups of at most ``limit`` that ``count`` samples are divided into."""
    return math.ceil(count / math.ceil(count / limit))
