"""Clips that cannot be read: left out, named, counted, replaced, and too many of them."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.datasets.dataloader import build_train_loader, endless, prefetch
from opensora.datasets.dataset import VideoTextDataset, collate_as_bytes, frame_strides
from opensora.datasets.rows import read_numbers
from opensora.datasets.source import SampleKey
from opensora.datasets.video_io import BrokenMediaError
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video

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


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("height", "tall", "row 7: height is 'tall', expected a whole number from 1 .1 rows in all.; scripts/cnv/meta"),
        ("num_frames", None, "row 7: num_frames is empty"),
        ("num_frames", 8.5, "row 7: num_frames is 8.5"),
        ("width", float("inf"), "row 7: width is inf"),
        ("fps", "fast", "row 7: fps is 'fast', expected a number from 0, or nothing"),
        ("fps", -8.0, "row 7: fps is -8"),
        ("score_vmafmotion", "high", "row 7: score_vmafmotion is 'high'.*in all.$"),
    ],
)
def test_numbers_are_checked(clips, tmp_path, column, cell, message):
    table = pd.read_csv(clips).assign(score_vmafmotion=1.0)
    table["path"] = [str(clips.parent / path) for path in table["path"]]
    table[column] = table[column].astype(object)
    table.loc[5, column] = cell
    table.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(UserError, match=f"bad.csv, {message}"):
        VideoTextDataset(str(tmp_path / "bad.csv"), vmaf=True)
    table[column] = table[column].astype(str if isinstance(cell, str) else float)
    table.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=f"bad.parquet, {message}"):
        read_numbers(tmp_path / "bad.parquet", scores=("score_vmafmotion", "absent"))


def test_numbers_may_be_written_as_text(clips, tmp_path):
    table = pd.read_csv(clips).astype(str)
    table["path"] = [str(clips.parent / path) for path in table["path"]]
    table.to_parquet(tmp_path / "clips.parquet")
    item = VideoTextDataset(str(tmp_path / "clips.parquet"))[SampleKey(2, 9, 32, 32, 0)]
    assert (item["video"].shape, item["text"]) == ((3, 9, 32, 32), "clip 2. 8 FPS.")


def test_a_rate_beyond_reason_makes_a_clip_too_short():
    assert frame_strides(np.array([8.0, 1e12, np.nan]), 24).tolist() == [1, 2**31 - 1, 1]
    with pytest.raises(UserError, match="dataset.fps_max=0.0: must be above 0"):
        VideoTextDataset("clips.csv", fps_max=0)


def test_a_picture_whose_row_says_that_it_is_a_clip_is_left_out(clips, tmp_path):
    table = pd.read_csv(clips)
    table["path"] = [str(clips.parent / path) for path in table["path"]]
    table.loc[2, "path"] = str(save_image(np.zeros((32, 32, 3), dtype=np.uint8), tmp_path / "a.png"))
    table.to_csv(tmp_path / "clips.csv", index=False)
    found, loader = batches(tmp_path / "clips.csv", 0, 0, 6)
    assert all(batch["video"].shape == (2, 3, 9, 32, 32) for batch in found)
    assert "a.png: a picture, but num_frames is 17" in loader.broken.reasons[2]


def test_prefetching_changes_nothing(clips):
    plain, _ = batches(clips, 0, 0, 3)
    moved = list(prefetch(iter(plain), torch.device("cpu"), torch.float64))
    assert [b["video"].dtype for b in moved] == [torch.float64] * 3
    assert all(torch.equal(a["video"].double(), b["video"]) for a, b in zip(plain, moved))


def test_clips_travel_from_workers_as_bytes_and_become_floats_where_they_go_to(clips):
    """A quarter of what processes hand on; and the same pixels, also beside one of which there are none."""
    plain, _ = batches(clips, 0, 0, 3)
    dataset = VideoTextDataset(str(clips), max_broken=0.5)
    loader, sampler = build_train_loader(dataset, CONFIG, seed=1, num_workers=1, as_bytes=True)
    packed = [batch for _, batch in zip(range(3), endless(loader, sampler, 0))]
    assert {batch["video"].dtype for batch in packed} == {torch.uint8}
    assert [4 * batch["video"].nbytes for batch in packed] == [batch["video"].nbytes for batch in plain]
    for a, b in zip(plain, prefetch(iter(packed), torch.device("cpu"), torch.float32)):
        assert torch.equal(a["video"], b["video"])
        assert a["index"] == b["index"]
    whole = dataset[SampleKey(0, 9, 32, 32, seed=0)]
    other = {**whole, "video": whole["video"] * 0.999}
    assert collate_as_bytes([whole, whole])["video"].dtype == torch.uint8
    assert collate_as_bytes([whole, other])["video"].dtype == torch.float32
