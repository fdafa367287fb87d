"""Datasets of a few clips: trained on, after one message at most, or refused with what to change."""

import hashlib
from itertools import islice

import pandas as pd
import pytest

from opensora.config import load_config
from opensora.config.commands import TrainOptions, VaeTrainOptions
from opensora.datasets.buckets import BucketTable
from opensora.datasets.sampler import BucketBatchSampler
from opensora.datasets.source import ClipDataset
from opensora.utils.errors import UserError
from tests.conftest import ROOT

SHIPPED = [
    (path, options)
    for folder, options in (("diffusion", TrainOptions), ("vae", VaeTrainOptions))
    for path in sorted((ROOT / f"configs/{folder}/train").glob("demo_*.py"))
]


class Rows(ClipDataset):
    """Sizes of clips that are never read."""

    def __init__(self, *sizes):
        self.data_path = "rows"
        self.data = pd.DataFrame(sizes, columns=["num_frames", "height", "width"])


def rows_of(sampler, epochs, first=0):
    """Rows of each micro-batch, epoch by epoch, as training reads them."""
    sampler.set_epoch(first, endless=True)
    return [[key.row for key in batch] for batch in islice(sampler, epochs * len(sampler))]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 11])
@pytest.mark.parametrize(("path", "options"), SHIPPED, ids=lambda value: getattr(value, "stem", ""))
def test_a_few_clips_train_with_every_small_config(path, options, count):
    cfg = load_config(path, options)
    for buckets in filter(None, (cfg.bucket_config, getattr(cfg, "image_bucket_config", None))):
        sampler = BucketBatchSampler(Rows(*[(17, 64, 64)] * count), BucketTable(buckets), seed=cfg.seed)
        batches = rows_of(sampler, 40)
        assert {row for batch in batches for row in batch} == set(range(count)), "every row is trained"
        assert all(len(set(batch)) == len(batch) for batch in batches)
        assert sampler.notice is None or "\n" not in sampler.notice
        replayed = BucketBatchSampler(Rows(*[(17, 64, 64)] * count), BucketTable(buckets), seed=cfg.seed)
        assert rows_of(replayed, 30, first=10) == batches[10 * len(sampler) :], "a resumed run reads the same"


@pytest.mark.parametrize(("count", "probability"), [(8, 0.5), (8, 0.1), (3, 0.02), (5, 0.9)])
def test_epochs_whose_draw_keeps_nothing_go_on(count, probability):
    for seed in range(20):
        buckets = {"64px_ar1:1": {17: (probability, 4)}}
        sampler = BucketBatchSampler(Rows(*[(17, 64, 64)] * count), BucketTable(buckets), seed=seed)
        assert len(rows_of(sampler, 30)) == 30 * len(sampler) > 0


def test_what_a_user_should_know_is_one_line():
    few = BucketBatchSampler(Rows(*[(17, 64, 64)] * 5), BucketTable({"64px_ar1:1": {17: (1.0, 48)}}))
    assert few.notice == (
        "rows: fewer clips than a batch, so the batches are smaller than bucket_config says "
        "(64px_ar1:1 1:1 x 17 frames: 5, not 48)"
    )
    mixed = Rows(*[(17, 64, 64)] * 8, *[(9, 64, 64)] * 3)
    sampler = BucketBatchSampler(mixed, BucketTable({"64px_ar1:1": {17: (1.0, 4), 9: (1.0, 4)}}))
    assert "3 rows are not trained" in sampler.notice
    assert "64px_ar1:1 1:1 x 9 frames: 3 of 4" in sampler.notice
    assert "8 of 11 rows are used\n        3 rows are fewer than a batch of their bucket" in sampler.describe()
    enough = BucketBatchSampler(mixed, BucketTable({"64px_ar1:1": {17: (1.0, 4), 9: (1.0, 3)}}))
    assert enough.notice is None
    assert "11 of 11 rows are used" in enough.describe()


def test_processes_share_a_few_clips_or_are_refused():
    buckets = BucketTable({"64px_ar1:1": {17: (1.0, 48)}})
    ranks = [BucketBatchSampler(Rows(*[(17, 64, 64)] * 5), buckets, num_replicas=2, rank=rank) for rank in range(2)]
    assert [len(batch) for sampler in ranks for batch in sampler] == [2, 2]
    with pytest.raises(UserError, match="no bucket has a full batch for 8 ranks"):
        BucketBatchSampler(Rows(*[(17, 64, 64)] * 5), buckets, num_replicas=8)


def test_the_order_of_datasets_that_fill_batches_is_as_ever():
    sizes = [(17, 64, 64)] * 40 + [(9, 64, 128)] * 13 + [(1, 64, 64)] * 7
    table = BucketTable({"64px": {1: (1.0, 2), 9: (1.0, 3), 17: ((0.9, 0.3), 4)}})
    order = rows_of(BucketBatchSampler(Rows(*sizes), table, seed=5), 6)
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == "c370e88727846b1d"
