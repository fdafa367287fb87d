"""From a dataset and a bucket config to batches on the device."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataset import collate, collate_as_bytes
from opensora.datasets.sampler import BucketBatchSampler
from opensora.datasets.sharing import SharingLoader
from opensora.datasets.source import ClipSource, SampleKey
from opensora.datasets.table import row_name, row_number
from opensora.datasets.transforms import in_model_range
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

SHOWN = 5  # broken rows that a summary names


class BrokenRows:
    """Unreadable rows so far, and the limit at which loading stops.

    Args:
        dataset: ``max_broken`` of its rows (one at least, unless it is 0) are tolerated.
    """

    def __init__(self, dataset: ClipSource) -> None:
        self.data_path, self.total = dataset.data_path, len(dataset)
        share = dataset.max_broken
        self.limit = max(int(share * self.total), 1) if share > 0 else 0
        self.reasons: dict[int, str] = {}

    def check(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without its ``broken`` entry, each new row of which is logged.

        Raises:
            UserError: more rows are broken than tolerated, or a sample and all its spares; with a summary.
        """
        for row, reason in batch.pop("broken", ()):
            if row not in self.reasons:
                self.reasons[row] = reason
                logger.warning(
                    "%s is left out: %s (%d so far)", row_name(self.data_path, row), reason, len(self.reasons)
                )
        if len(self.reasons) > self.limit:
            raise UserError(
                f"{self.data_path}: {len(self.reasons)} of {self.total} rows are unreadable, dataset.max_broken allows "
                f"{self.limit}.\n{self.summary()}"
            )
        if "failed" in batch:
            rows = ", ".join(str(row_number(row)) for row in batch["failed"])
            raise UserError(
                f"{self.data_path}: row {rows} and everything drawn in its place is unreadable.\n{self.summary()}"
            )
        return batch

    def summary(self) -> str:
        """The first broken rows with their reasons."""
        lines = [f"row {row_number(row)}: {reason}" for row, reason in sorted(self.reasons.items())[:SHOWN]]
        more = len(self.reasons) - SHOWN
        return "\n".join(lines + ([f"and {more} more"] if more > 0 else []))


def ignore_foreign_sigterm(worker: int) -> None:
    """Let a process that reads clips go on after a SIGTERM that does not come from the one it reads for.

    torchrun and schedulers send SIGTERM to all processes of a run at once, and the run needs its readers to finish and
    save the step at hand. It ends them itself when it ends (and their own check that it is alive does, if it is
    killed). Linux only: elsewhere the sender is not known.

    Args:
        worker: its number. It was started within `sigterm_held`, so that nothing reached it before.
    """
    if sys.platform != "linux":
        return

    def wait_for_the_trainer() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_the_trainer, daemon=True).start()


@contextmanager
def sigterm_held() -> Iterator[None]:
    """Processes and threads that start in it do not get a SIGTERM; this one gets it when it is over. Linux only."""
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class BucketLoader(SharingLoader):
    """Loader of micro-batches that keeps count of unreadable rows in ``broken``."""

    def __init__(self, dataset: ClipSource, **options: Any) -> None:
        super().__init__(cast(Dataset, dataset), **options)
        self.broken = BrokenRows(dataset)

    def __iter__(self) -> Any:
        with sigterm_held():
            batches = super().__iter__()
        return (self.broken.check(batch) for batch in batches)


def build_train_loader(
    dataset: ClipSource,
    bucket_config: Mapping[str, Mapping],
    *,
    multiple: int = 16,
    seed: int = 0,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
    same_windows: bool = False,
    is_encoded: Callable[[SampleKey], bool] | None = None,
    as_bytes: bool = False,
) -> tuple[BucketLoader, BucketBatchSampler]:
    """Loader of bucketed micro-batches and its sampler (to set the epoch and the place to resume at).

    Args:
        dataset: clips with captions.
        bucket_config: see :mod:`opensora.datasets.buckets`.
        multiple: heights and widths are multiples of this many pixels.
        seed: of bucket choice, order and crops. Crops do not depend on which worker makes them.
        num_workers: processes that read clips; 0 reads in this one.
        prefetch_factor: micro-batches each of them reads ahead.
        pin_memory: page-locked memory, from which a GPU copies while it computes.
        num_replicas, rank: data-parallel size and place.
        same_windows: show each clip at the frames of the first epoch, in all epochs.
        is_encoded: see :class:`opensora.datasets.sampler.BucketBatchSampler`.
        as_bytes: ``video`` may be uint8, as whoever passes batches through :func:`to_device` takes it.

    Raises:
        UserError: malformed buckets, or no full batch.
    """
    table = BucketTable(bucket_config, multiple)
    sampler = BucketBatchSampler(dataset, table, seed, num_replicas, rank, same_windows, is_encoded)
    loader = BucketLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_as_bytes if as_bytes and num_workers else collate,
        num_workers=num_workers,
        prefetch_factor=(prefetch_factor or 2) if num_workers else None,
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=ignore_foreign_sigterm,
    )
    return loader, sampler


def to_device(batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Move the floating-point tensors of a batch, without waiting where memory is pinned, and clips in uint8, which
    become floats there.

    The ``states`` of trajectories keep their own dtype: their differences are what matters.
    """
    moved = dict(batch)
    for key, value in batch.items():
        if not torch.is_tensor(value):
            continue
        if value.is_floating_point():
            moved[key] = value.to(device, None if key == "states" else dtype, non_blocking=True)
        elif key == "video":
            moved[key] = in_model_range(value.to(device, non_blocking=True)).to(dtype)
    return moved


def endless(loader: DataLoader, sampler: BucketBatchSampler, micro_step: int) -> Iterator[dict[str, Any]]:
    """Batches from global micro-step ``micro_step`` on, epoch after epoch, with the same worker processes throughout.

    The place is worked out from the step alone, so a resumed run reads exactly what a run never stopped would have.
    """
    epoch, start = divmod(micro_step, len(sampler))
    sampler.set_epoch(epoch, start, endless=True)
    yield from loader


def prefetch(
    batches: Iterator[dict[str, Any]], device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The same batches on the device, each copied there while the one before it is worked on.

    On a GPU the copy runs on a stream of its own; elsewhere batches are converted as they come, without reading ahead.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device, dtype) for batch in batches)
        return
    copying = torch.cuda.Stream(device)

    def start(batch: dict[str, Any] | None) -> dict[str, Any] | None:
        with torch.cuda.stream(copying):
            return None if batch is None else to_device(batch, device, dtype)

    coming = start(next(batches, None))
    while coming is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(copying)
        for value in coming.values():
            if torch.is_tensor(value) and value.is_cuda:
                value.record_stream(current)  # its memory was taken on the other stream
        ready, coming = coming, start(next(batches, None))
        yield ready
