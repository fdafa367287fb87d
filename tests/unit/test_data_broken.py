"""Clips that cannot be read: left out, named, counted, replaced, and too many of them."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.datasets.dataloader import build_train_loader, endless, prefetch
from opensora.datasets.dataset import SampleKey, VideoTextDataset
from opensora.datasets.video_io import BrokenMediaError
from opensora.utils.errors import UserError
from opensora.utils.video import save_video

CONFIG = {"32px_ar1:1": {9: (1.0, 2)}}
BROKEN = (3, 4)  # a file of zeros, and a clip shorter than its row says


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips of 17 frames, two of them not what the table says."""
    folder = tmp_path_factory.mktemp("broken")
    rows = []
    for i in range(12):
        frames = np.full((4 if i == 4 else 17, 32, 32, 3), 20 * i, dtype=np.uint8)
        frames += np.arange(len(frames), dtype=np.uint8)[:, None, None, None]
        save_video(frames, folder / f"{i}.mp4", fps=8)
        rows.append({"path": f"{i}.mp4", "text": f"clip {i}", "num_frames": 17, "height": 32, "width": 32, "fps": 8.0})
    (folder / "3.mp4").write_bytes(bytes(1000))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return folder / "clips.csv"


@pytest.fixture
def heard(caplog, monkeypatch):
    """Warnings of the package, whose logger does not propagate once a program has set it up."""
    monkeypatch.setattr(logging.getLogger("opensora"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def batches(clips, workers, first, count, **options):
    dataset = VideoTextDataset(str(clips), max_broken=0.5, **options)
    loader, sampler = build_train_loader(dataset, CONFIG, seed=1, num_workers=workers)
    stream = endless(loader, sampler, first)
    return [next(stream) for _ in range(count)], loader


def test_broken_clips_are_replaced_the_same_way_every_time(clips, heard):
    whole, loader = batches(clips, 0, 0, 15)
    rows = [row for batch in whole for row in batch["index"]]
    assert not set(rows) & set(BROKEN)
    assert all(len(batch["text"]) == len(batch["video"]) == 2 for batch in whole)
    assert sorted(loader.broken.reasons) == list(BROKEN)
    assert "clips.csv, row 5 is left out" in heard.text  # the header is row 1
    assert "row 6 is left out" in heard.text
    in_workers, _ = batches(clips, 2, 0, 15)
    resumed, _ = batches(clips, 1, 7, 8)  # into the middle of the second epoch
    for others, same in ((in_workers, whole), (resumed, whole[7:])):
        for a, b in zip(others, same):
            assert a["index"] == b["index"]
            assert torch.equal(a["video"], b["video"])


def test_windows_differ_between_clips_and_epochs(clips):
    found, _ = batches(clips, 2, 0, 24)
    starts = {(int(i), round(float(v.mean()), 3)) for b in found for i, v in zip(b["index"], b["video"])}
    assert len(starts) > 15  # ten clips, four epochs, nine windows each


def test_too_many_stop_the_run(clips):
    loader, _ = build_train_loader(VideoTextDataset(str(clips), max_broken=0.1), CONFIG, seed=1)
    with pytest.raises(UserError, match=r"2 of 12 rows .* allows 1.\nrow 5: .*3.mp4.*\nrow 6: .*4.mp4"):
        list(loader)
    loader, _ = build_train_loader(VideoTextDataset(str(clips), max_broken=0), CONFIG, seed=1)
    with pytest.raises(UserError, match="1 of 12 rows"):
        list(loader)
    with pytest.raises(UserError, match="max_broken=2"):
        VideoTextDataset(str(clips), max_broken=2)


def test_without_spares(clips, tmp_path):
    with pytest.raises(BrokenMediaError, match="3.mp4"):
        VideoTextDataset(str(clips))[SampleKey(3, 9, 32, 32, 0)]
    table = pd.read_csv(clips).iloc[[3, 3]]
    table["path"] = str(clips.parent / "3.mp4")
    table.to_csv(tmp_path / "all.csv", index=False)
    loader, _ = build_train_loader(VideoTextDataset(str(tmp_path / "all.csv"), max_broken=1.0), CONFIG)
    with pytest.raises(UserError, match="row 2, 3 and everything drawn in its place|row 3, 2"):
        list(loader)


def test_numbers_are_checked(clips, tmp_path):
    table = pd.read_csv(clips)
    table["path"] = [str(clips.parent / path) for path in table["path"]]
    table["height"] = table["height"].astype(object)
    table.loc[5, "height"] = "tall"
    table.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(UserError, match="bad.csv, row 7: height is nan"):
        VideoTextDataset(str(tmp_path / "bad.csv"))


def test_prefetching_changes_nothing(clips):
    plain, _ = batches(clips, 0, 0, 3)
    moved = list(prefetch(iter(plain), torch.device("cpu"), torch.float64))
    assert [b["video"].dtype for b in moved] == [torch.float64] * 3
    assert all(torch.equal(a["video"].double(), b["video"]) for a, b in zip(plain, moved))
