"""Order of the micro-batches of an epoch: reproducible, divided over ranks, resumable at any step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from opensora.datasets.buckets import BucketTable
from opensora.datasets.source import ClipSource, SampleKey
from opensora.utils.errors import UserError, shorten

DRAWS = 64  # of buckets, until one draw keeps a row
SPARES = 8  # rows that may take the place of a broken one, tried in turn


@dataclass(frozen=True)
class _Plan:
    """Micro-batches of an epoch, a few bytes per row: ``rows`` bucket by bucket, and per micro-batch its bucket and
    where its rows begin."""

    rows: np.ndarray
    bucket_starts: np.ndarray  # where each bucket's rows begin; one more at the end
    buckets: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.buckets)


class BucketBatchSampler(Sampler[list[SampleKey]]):
    """Yields micro-batches of one bucket each.

    Everything follows from (seed, epoch): clips are shuffled within their bucket, incomplete micro-batches dropped,
    the micro-batches of all buckets shuffled together, and number ``i * num_replicas + rank`` given to ``rank``. Where
    no bucket has a full micro-batch for every rank, micro-batches are made smaller.

    Args:
        dataset: rows with num_frames, height, width.
        table: the buckets.
        seed: of bucket choice, order and crops.
        num_replicas, rank: data-parallel size and place.
        same_windows: show each clip at the frames of the first epoch, in all epochs.
        is_encoded: tells of which keys nobody needs the pixels; asked when a batch is drawn up, which may be some
            batches before it is used. Which batches are drawn does not depend on it.

    Raises:
        UserError: no bucket holds a clip for every rank; says why.

    Attributes:
        notice: what a user should know of how the rows are used, in one line; None if there is nothing to say.
    """

    def __init__(
        self, dataset: ClipSource, table: BucketTable, seed: int = 0, num_replicas: int = 1, rank: int = 0,
        same_windows: bool = False, is_encoded: Callable[[SampleKey], bool] | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.table, self.seed = dataset, table, seed
        self.num_replicas, self.rank = num_replicas, rank
        self.same_windows = same_windows
        self.is_encoded = is_encoded
        self.epoch, self.start, self.endless = 0, 0, False
        self._strides = dataset.strides()
        self._first = self._assign(0)
        self._length = len(self._plan(0)) // num_replicas
        self.notice = self._notice_of_lonely()
        if self._length == 0:
            self._fit_few()
        if self._length == 0:
            raise UserError(
                f"{dataset.data_path}: no bucket has a full batch{f' for {num_replicas} ranks' * (num_replicas > 1)}.\n"
                f"{self.describe(0)}\nAdd clips, lower the batch sizes, or change bucket_config."
            )

    def _fit_few(self) -> None:
        """Make the batches of a dataset smaller that would not fill a single one for every rank."""
        draws = (self._assign(epoch) for epoch in range(DRAWS))  # probabilities may keep none of a few rows
        self._first = next((assigned for assigned in draws if (assigned >= 0).any()), self._first)
        given, self.table = self.table, self.table.shrunk(self._first, self.num_replicas)
        self._length = len(self._plan(0)) // self.num_replicas
        used = [(given.buckets[n], self.table.buckets[n]) for n in np.unique(self._first[self._first >= 0])]
        changes = [f"{old.resolution} {old.ratio} x {old.num_frames} frames: {new.batch_size}, not {old.batch_size}"
                   for old, new in used]  # fmt: skip
        self.notice = (
            f"{self.dataset.data_path}: fewer clips than a batch, so the batches are smaller than bucket_config says "
            f"({shorten(changes)})"
        )

    def _notice_of_lonely(self) -> str | None:
        lonely = self.table.lonely(self._first)
        if not lonely:
            return None
        few = [f"{b.resolution} {b.ratio} x {b.num_frames} frames: {n} of {b.batch_size}" for b, n in lonely.items()]
        return (
            f"{self.dataset.data_path}: {sum(lonely.values())} rows are not trained, since their buckets have fewer "
            f"clips than a batch ({shorten(few)}); a smaller batch in bucket_config takes them in"
        )

    def __len__(self) -> int:
        """Micro-batches per rank in every epoch (as many as the first one has)."""
        return self._length

    def set_epoch(self, epoch: int, start: int = 0, endless: bool = False) -> None:
        """Choose the epoch to iterate and the micro-batch of this rank to begin with.

        Args:
            epoch: from 0.
            start: micro-batch of this rank.
            endless: continue with the next epochs instead of ending, so that loader workers need not be restarted.
        """
        self.epoch, self.start, self.endless = epoch, start, endless

    def describe(self, epoch: int | None = None) -> str:
        """Table of buckets and counts of an epoch (the current one), and why rows are left out."""
        assigned = self._assign(self.epoch if epoch is None else epoch)
        fixed = self.dataset.fixed_sizes()
        if fixed is not None:
            reasons = _explain_fixed(fixed, assigned)
        else:
            reasons = self.table.explain(self.dataset.data, self._strides, assigned)
        return self.table.describe(assigned) + (f"\n{reasons}" if reasons else "")

    def assigned(self, epoch: int = 0) -> np.ndarray:
        """Bucket number of every row in an epoch, -1 where it is not used."""
        return self._assign(epoch)

    def sample_key(self, row: int, bucket: int, epoch: int = 0) -> SampleKey:
        """Key of one row in an epoch, without spares."""
        b = self.table.buckets[bucket]
        return SampleKey(row, b.num_frames, b.height, b.width, self._epoch_seed(epoch))

    def _assign(self, epoch: int) -> np.ndarray:
        if epoch == 0 and hasattr(self, "_first"):
            return self._first
        fixed = self.dataset.fixed_sizes()
        if fixed is not None:
            return self.table.find(*fixed).astype(np.int32)
        return self.table.assign(self.dataset.data, self._strides, seed=self.seed + epoch).astype(np.int32)

    def _plan(self, epoch: int) -> _Plan:
        """All micro-batches of an epoch in order; one without any takes the buckets of the first epoch."""
        plan = self._plan_of(epoch, self._assign(epoch))
        return plan if len(plan) else self._plan_of(epoch, self._first)

    def _plan_of(self, epoch: int, assigned: np.ndarray) -> _Plan:
        rng = np.random.default_rng([self.seed, epoch])
        order = np.argsort(assigned, kind="stable").astype(np.int32)
        bounds = np.searchsorted(assigned[order], np.arange(len(self.table.buckets) + 1))
        buckets, starts = [], []
        for number, bucket in enumerate(self.table.buckets):
            rows = slice(bounds[number], bounds[number + 1])
            order[rows] = rng.permutation(order[rows])
            full = (rows.stop - rows.start) // bucket.batch_size
            buckets.append(np.full(full, number, dtype=np.int32))
            starts.append(rows.start + np.arange(full) * bucket.batch_size)
        shuffled = rng.permutation(sum(map(len, buckets)))
        return _Plan(order, bounds, np.concatenate(buckets)[shuffled], np.concatenate(starts)[shuffled])

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, start = self.epoch, self.start
        while True:
            plan = self._plan(epoch)
            for step in range(start, self._length):
                # Random bucket choice can leave an epoch a little short: it wraps, so that all epochs are equally long
                # and the place in the data follows from the step alone.
                yield self._batch(plan, (step * self.num_replicas + self.rank) % len(plan), epoch)
            if not self.endless:
                return
            epoch, start = epoch + 1, 0

    def _batch(self, plan: _Plan, number: int, epoch: int) -> list[SampleKey]:
        place = int(plan.buckets[number])
        bucket = self.table.buckets[place]
        first, behind = int(plan.bucket_starts[place]), int(plan.bucket_starts[place + 1])
        keys, seed = [], self._epoch_seed(epoch)
        for row in plan.rows[plan.starts[number] : plan.starts[number] + bucket.batch_size].tolist():
            draws = np.random.SeedSequence([self.seed, epoch, row]).generate_state(SPARES)
            spares = tuple(plan.rows[first + draws % (behind - first)].tolist())
            key = SampleKey(row, bucket.num_frames, bucket.height, bucket.width, seed, spares)
            keys.append(key._replace(read=self.is_encoded is None or not self.is_encoded(key)))
        return keys

    def _epoch_seed(self, epoch: int) -> int:
        """Seed of the windows of an epoch; the dataset draws each row's from it and the row."""
        return int(np.random.SeedSequence([self.seed, 0 if self.same_windows else epoch]).generate_state(1)[0])


def _explain_fixed(sizes: tuple[np.ndarray, np.ndarray, np.ndarray], assigned: np.ndarray) -> str:
    """Why rows of a dataset with fixed sizes (a cache) are not used: a line per reason."""
    unused = np.stack(sizes, axis=1)[assigned < 0]
    found, counts = np.unique(unused, axis=0, return_counts=True)
    return "\n".join(
        f"{count:>9} rows are " + (f"cached at {t}x{h}x{w}, which is no bucket" if t else "not cached")
        for (t, h, w), count in zip(found.tolist(), counts.tolist())
    )
