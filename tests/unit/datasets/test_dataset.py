"""Tables, frames, buckets, order of batches."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataloader import build_train_loader, endless
from opensora.datasets.dataset import VideoTextDataset, add_suffix, choose_frames, target_fps
from opensora.datasets.sampler import BucketBatchSampler
from opensora.datasets.source import SampleKey
from opensora.datasets.table import read_table
from opensora.datasets.transforms import resize_crop, to_model_range
from opensora.datasets.video_io import BrokenMediaError, read_frames
from opensora.utils.errors import UserError
from opensora.utils.video import save_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips of 17 frames whose grey level tells the frame number, and their table."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(12):
        grey = np.arange(17, dtype=np.uint8) * 12 + i
        frames = np.broadcast_to(grey[:, None, None, None], (17, 32, 32, 3)).copy()
        save_video(frames, folder / f"{i}.mp4", fps=8, crf=5)
        rows.append({"path": f"{i}.mp4", "text": f"clip {i}", "num_frames": 17, "height": 32, "width": 32, "fps": 8.0})
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return folder / "clips.csv"


def test_frames_are_the_ones_asked_for(clips):
    wanted = [3, 7, 16]
    frames = read_frames(clips.parent / "0.mp4", wanted)
    # h264 at crf 5 keeps flat grey within 3 levels.
    assert np.abs(frames.mean(axis=(1, 2, 3)) - np.array(wanted) * 12).max() < 3
    with pytest.raises(BrokenMediaError, match="frame 20"):
        read_frames(clips.parent / "0.mp4", [0, 20])
    with pytest.raises(BrokenMediaError, match="cannot be decoded"):
        read_frames(clips, [0])


def test_dataset_item(clips):
    dataset = VideoTextDataset(str(clips), fps_max=24)
    item = dataset[SampleKey(2, 9, 16, 24, seed=5)]
    assert item["video"].shape == (3, 9, 16, 24)
    assert item["video"].abs().max() <= 1
    assert item["text"] == "clip 2. 8 FPS."
    again = dataset[SampleKey(2, 9, 16, 24, seed=5)]["video"]
    assert torch.equal(item["video"], again)
    kept = VideoTextDataset(str(clips), fps_max=24, keep_in_memory=True)
    assert torch.equal(kept[SampleKey(2, 9, 16, 24, seed=5)]["video"], again)


def test_bad_tables_are_named(tmp_path, clips):
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv")
    table = pd.read_csv(clips)
    table.rename(columns={"text": "txt"}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match="missing column 'text' .is 'txt' meant"):
        VideoTextDataset(str(tmp_path / "a.csv"))
    table.to_csv(tmp_path / "b.csv", index=False)  # relative paths, no clips here
    with pytest.raises(UserError, match="12 of 12 clips are missing: row 2: 0.mp4"):
        VideoTextDataset(str(tmp_path / "b.csv"))


def test_captions_are_taken_letter_by_letter(tmp_path, clips):
    texts = ["7", "None", "NA", "null", "007", "", '"a, b"', "1e3"]
    header = "path,text,num_frames,height,width,fps\n"
    rows = [f"{clips.parent / f'{i}.mp4'},{text},17,64,64,8\n" for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text(header + "".join(rows))
    dataset = VideoTextDataset(str(tmp_path / "a.csv"), fps_max=999)
    expected = ["7", "None", "NA", "null", "007", "", "a, b", "1e3"]
    assert [dataset.caption(SampleKey(i, 17, 64, 64, 0), dataset.row(i)) for i in range(8)] == expected
    dataset.data.assign(text=range(8)).to_parquet(tmp_path / "b.parquet")
    numbers = VideoTextDataset(str(tmp_path / "b.parquet"), fps_max=999)
    assert numbers.caption(SampleKey(3, 17, 64, 64, 0), numbers.row(3)) == "3"
    (tmp_path / "c.csv").write_text(header + "".join(row.replace(",17", " and more,x,17") for row in rows[:2]))
    with pytest.raises(UserError, match="rows have more fields than its header; quote texts that contain commas"):
        read_table(tmp_path / "c.csv")


def test_fps_and_suffix():
    assert target_fps(24, 24) == (24, 1)
    assert target_fps(30, 24) == (15, 2)
    assert target_fps(29.97, 24) == (14, 2)
    assert target_fps(float("nan"), 24) == (0.0, 1)
    assert add_suffix("a cat", 24, 24, 3.6) == "a cat. 24 FPS, 4 motion score."
    assert add_suffix("a cat", 0, 24) == "a cat"
    assert add_suffix("a cat", 24, 999) == "a cat"


def test_choose_frames_stays_inside():
    for seed in range(50):
        frames = choose_frames(17, 5, 2, np.random.default_rng(seed))
        assert frames[0] >= 0
        assert frames[-1] <= 16
        assert (np.diff(frames) >= 1).all()


def test_resize_crop_covers_and_centres():
    video = to_model_range(np.random.default_rng(0).integers(0, 255, (2, 20, 40, 3), dtype=np.uint8))
    assert resize_crop(video, 20, 20).shape == (3, 2, 20, 20)
    assert torch.equal(resize_crop(video, 20, 20), video[:, :, :, 10:30])
    assert torch.equal(resize_crop(video, 20, 40), video)


def sizes(*rows):
    return pd.DataFrame(rows, columns=["num_frames", "height", "width"])


def test_bucket_assignment():
    table = BucketTable({"64px": {1: (1.0, 4), 9: (1.0, 2), 17: (1.0, 2)}, "128px": {1: (1.0, 2)}})
    rows = sizes((17, 64, 64), (16, 64, 64), (8, 64, 64), (1, 128, 128), (1, 64, 64), (17, 32, 32))
    assigned = table.assign(rows, np.ones(len(rows), dtype=int), seed=0)
    found = [(table.buckets[i].resolution, table.buckets[i].num_frames) if i >= 0 else None for i in assigned]
    assert found[:2] == [("64px", 17), ("64px", 9)]
    assert found[2] is None  # eight frames fit no video bucket, and a video is no picture
    assert found[3:6] == [("128px", 1), ("64px", 1), None]
    wide = BucketTable({"128px": {17: (1.0, 2)}})
    bucket = wide.buckets[wide.assign(sizes((17, 96, 192)), np.ones(1, dtype=int), seed=0)[0]]
    assert (bucket.ratio, bucket.height, bucket.width) == ("2:1", 96, 176)
    strided = table.assign(rows[:1], np.array([2]), seed=0)
    assert strided[0] == -1


def test_bucket_probabilities():
    rows = sizes(*[(17, 64, 64)] * 4000)
    table = BucketTable({"64px_ar1:1": {17: ((1.0, 0.25), 2), 9: (0.5, 2)}})
    assigned = table.assign(rows, np.ones(4000, dtype=int), seed=3)
    shares = [(assigned == i).mean() for i, _ in enumerate(table.buckets)]
    # Three standard deviations of 4000 draws are 0.02.
    assert shares == pytest.approx([0.75, 0.125], abs=0.03)


@pytest.mark.parametrize("bad", [{}, {17: 2}, {17: (1.0,)}, {17: (2.0, 2)}, {0: (1.0, 2)}, {17: (1.0, 0)}])
def test_malformed_buckets_are_named(bad):
    with pytest.raises(UserError, match="64px"):
        BucketTable({"64px": bad})


def test_order_is_shared_out_and_resumable(clips):
    dataset = VideoTextDataset(str(clips))
    config = {"32px_ar1:1": {9: (1.0, 2)}}
    table = BucketTable(config)
    ranks = [BucketBatchSampler(dataset, table, seed=1, num_replicas=2, rank=r) for r in range(2)]
    seen = [[key.row for batch in sampler for key in batch] for sampler in ranks]
    assert sorted(seen[0] + seen[1]) == list(range(12))
    loader, sampler = build_train_loader(dataset, config, seed=1)
    stream = endless(loader, sampler, 0)
    whole = [next(stream) for _ in range(9)]
    resumed = next(endless(loader, sampler, 8))
    assert resumed["index"] == whole[8]["index"]
    assert torch.equal(resumed["video"], whole[8]["video"])
    with pytest.raises(UserError, match="no bucket has a full batch"):
        BucketBatchSampler(dataset, BucketTable({"32px": {33: (1.0, 2)}}))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the sender of a signal is not known")
def test_readers_outlive_a_sigterm_of_others(clips):
    """torchrun's reaches them too, and the step at hand needs their batches; the trainer's own ends them."""
    loader, _ = build_train_loader(
        VideoTextDataset(str(clips), fps_max=24), {"32px_ar1:1": {4: (1.0, 1)}}, num_workers=2, prefetch_factor=1
    )
    command = "import os, sys; [os.kill(int(reader), 15) for _ in range(200) for reader in sys.argv[1:]]"
    batches = iter(loader)
    readers = multiprocessing.active_children()
    assert len(readers) == 2
    subprocess.run([sys.executable, "-c", command, *(str(reader.pid) for reader in readers)], check=True)
    assert len(list(batches)) == len(loader)
    batches = iter(loader)
    next(batches)
    for reader in set(multiprocessing.active_children()) - set(readers):
        reader.terminate()
        reader.join(60)
        assert reader.exitcode == 0
