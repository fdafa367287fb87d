"""How batches come from the processes that read clips: in shared memory, or through a pipe where there is too little of
it. (Containers have 64 MB; a process that finds none is killed, or its batch never comes.)"""

import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora.utils.logging import get_logger
from opensora.utils.sizes import size_text
from opensora.utils.temporary import keep_sockets

SHARED = Path("/dev/shm")
logger = get_logger(__name__)


class Piped(NamedTuple):
    """A tensor as bytes, which go through a pipe."""

    content: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Piped":
        """Its bytes."""
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        return cls(content, tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """The tensor."""
        if not self.content.size:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_numpy(self.content).view(self.dtype).view(self.shape)


def _changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Dicts, lists and tuples in which all that is of a kind is changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(each, kind, change) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_changed(each, kind, change) for each in value)
    return value


def unchanged(clip: Any) -> Any:
    """The ``collate_fn`` of a loader without batches."""
    return clip


def shared_flags(count: int) -> Tensor:
    """Booleans, all off, bool [count], of this process and those forked from it; they take nothing of ``SHARED``."""
    return torch.frombuffer(mmap.mmap(-1, max(count, 1)), dtype=torch.bool)[:count]


class Sender:
    """What a loader's processes make of samples.

    Args:
        collate: makes the batch: tensors, in dicts, lists and tuples.
        workers: how many processes share the memory.
    """

    def __init__(self, collate: Callable[[Any], Any], workers: int) -> None:
        self.collate, self.workers, self.has_told = collate, workers, False

    def __call__(self, samples: Any) -> Any:
        """A batch, whose tensors are :class:`Piped` where shared memory has no room for one of every process."""
        batch, sizes = self.collate(samples), []
        _changed(batch, Tensor, lambda tensor: sizes.append(tensor.nbytes))
        free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else None
        if free is None or free >= sum(sizes) * self.workers:
            return batch
        if not self.has_told:
            self.has_told = True
            logger.warning(
                "%s has room for %s, a batch takes %s: batches come through a pipe, which is slower (containers: give "
                "--shm-size)",
                *(SHARED, size_text(free), size_text(sum(sizes))),
            )
        return _changed(batch, Tensor, Piped.of)


class SharingLoader(DataLoader):
    """A loader whose processes (``num_workers`` above 0) work on with little shared memory; see :class:`Sender`."""

    def __init__(
        self, dataset: Dataset, collate_fn: Callable[[Any], Any], num_workers: int = 0, **options: Any
    ) -> None:
        collate = Sender(collate_fn, num_workers) if num_workers else collate_fn
        super().__init__(dataset, collate_fn=collate, num_workers=num_workers, **options)

    def __iter__(self) -> Any:
        if self.num_workers:
            keep_sockets()  # through which its processes hand over what lies in shared memory
        return self._received(super().__iter__())

    @staticmethod
    def _received(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield _changed(batch, Piped, Piped.tensor)
