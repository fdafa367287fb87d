"""Order of the micro-batches of an epoch: reproducible, divided over ranks, resumable at any step."""

import numpy as np
from torch.utils.data import Sampler

from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataset import SampleKey, VideoTextDataset
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)


class BucketBatchSampler(Sampler[list[SampleKey]]):
    """Yields micro-batches of one bucket each.

    Everything follows from (seed, epoch): clips are shuffled within their bucket, incomplete micro-batches dropped,
    the micro-batches of all buckets shuffled together, and number ``i * num_replicas + rank`` given to ``rank``.

    Args:
        dataset: rows with num_frames, height, width.
        table: the buckets.
        seed: of bucket choice, order and crops.
        num_replicas, rank: data-parallel size and place.

    Raises:
        UserError: no bucket holds a full micro-batch for every rank.
    """

    def __init__(
        self, dataset: VideoTextDataset, table: BucketTable, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        self.dataset, self.table, self.seed = dataset, table, seed
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.start = 0, 0
        self._strides = np.array([dataset.stride(i) for i in range(len(dataset))])
        self._length = len(self._plan(0)) // num_replicas
        if self._length == 0:
            raise UserError(
                f"{dataset.data_path}: no bucket has a full batch.\n{table.describe(self._assign(0))}\n"
                "Add clips, lower the batch sizes, or change bucket_config."
            )

    def __len__(self) -> int:
        """Micro-batches per rank in every epoch (as many as the first one has)."""
        return self._length

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch to iterate and the micro-batch of this rank to begin with."""
        self.epoch, self.start = epoch, start

    def describe(self) -> str:
        """Table of buckets and counts of the current epoch."""
        return self.table.describe(self._assign(self.epoch))

    def _assign(self, epoch: int) -> np.ndarray:
        return self.table.assign(self.dataset.data, self._strides, seed=self.seed + epoch)

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """All micro-batches of an epoch in order: (bucket, rows)."""
        assigned = self._assign(epoch)
        rng = np.random.default_rng([self.seed, epoch])
        batches: list[tuple[int, np.ndarray]] = []
        for number, bucket in enumerate(self.table.buckets):
            rows = rng.permutation(np.flatnonzero(assigned == number))
            full = len(rows) // bucket.batch_size
            batches += [(number, rows[i * bucket.batch_size : (i + 1) * bucket.batch_size]) for i in range(full)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self):
        plan = self._plan(self.epoch)
        for step in range(self.start, self._length):
            # Random bucket choice can leave an epoch a little short: it wraps, so that all epochs are equally long
            # and the place in the data follows from the step alone.
            number, rows = plan[(step * self.num_replicas + self.rank) % len(plan)]
            bucket = self.table.buckets[number]
            yield [
                SampleKey(int(row), bucket.num_frames, bucket.height, bucket.width, self._sample_seed(int(row)))
                for row in rows
            ]

    def _sample_seed(self, row: int) -> int:
        return int(np.random.SeedSequence([self.seed, self.epoch, row]).generate_state(1)[0])
