"""From a dataset and a bucket config to batches on the device."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataset import VideoTextDataset, collate
from opensora.datasets.sampler import BucketBatchSampler


def build_train_loader(
    dataset: VideoTextDataset,
    bucket_config: Mapping[str, Mapping],
    *,
    multiple: int = 16,
    seed: int = 0,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
) -> tuple[DataLoader, BucketBatchSampler]:
    """Loader of bucketed micro-batches and its sampler (to set the epoch and the place to resume at)."""
    table = BucketTable(bucket_config, multiple)
    sampler = BucketBatchSampler(dataset, table, seed, num_replicas, rank)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=(prefetch_factor or 2) if num_workers else None,
        pin_memory=pin_memory,
        persistent_workers=False,
    )
    return loader, sampler


def to_device(batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Move the floating-point tensors of a batch, without waiting where memory is pinned."""
    return {
        key: value.to(device, dtype, non_blocking=True)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for key, value in batch.items()
    }


def endless(loader: DataLoader, sampler: BucketBatchSampler, micro_step: int) -> Iterator[dict[str, Any]]:
    """Batches from global micro-step ``micro_step`` on, epoch after epoch.

    The place is worked out from the step alone, so a resumed run reads exactly what a run never stopped would have.
    """
    per_epoch = len(sampler)
    epoch, start = divmod(micro_step, per_epoch)
    while True:
        sampler.set_epoch(epoch, start)
        yield from loader
        epoch, start = epoch + 1, 0
