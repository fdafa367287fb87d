"""Rows that name files as people have them: measured, read and listed the way they are shown."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.datasets.dataset import FPS_SLACK, SampleKey, VideoTextDataset, frame_strides, target_fps
from opensora.datasets.meta import probe_media, write_meta
from opensora.evaluation.clips import EvalClip, list_media, read_clip
from opensora.utils import video
from opensora.utils.errors import UserError
from tests.unit.utils.media_files import numbered, numbers_of, scene, write_clip


@pytest.fixture
def folder(tmp_path):
    """A turned clip in a container of a rare ending, one of variable rate, a photograph, none of a codec, and texts."""
    write_clip(tmp_path / "phone.3gp", scene(), "mpeg4", turned=(-90, False, False))
    times = [*range(12), *range(12, 48, 3)]
    write_clip(tmp_path / "variable.mov", numbered(24), times=times, options={"crf": "5"})
    write_clip(tmp_path / "named.png", scene(), container={"format": "mpegts"})
    odd = write_clip(tmp_path / "odd.mp4", scene())
    odd.write_bytes(odd.read_bytes().replace(b"avc1", b"zzzz"))
    (tmp_path / "notes.txt").write_text("hello\n" * 100)
    return tmp_path


def test_meta_and_training_agree(folder):
    names = ["phone.3gp", "variable.mov", "odd.mp4", "named.png"]
    pd.DataFrame({"path": names, "text": ["a", "b", "c", "d"]}).to_csv(folder / "t.csv", index=False)
    assert write_meta(folder / "t.csv", folder / "m.csv", num_workers=0) == (3, 1)
    table = pd.read_csv(folder / "m.csv")
    assert table[["num_frames", "height", "width"]].values.tolist() == [[12, 160, 96], [24, 96, 160], [12, 96, 160]]
    broken = pd.read_csv(folder / "m_broken.csv")
    assert broken["row"].tolist() == [4]
    assert "odd.mp4" in broken["error"][0]
    dataset = VideoTextDataset(str(folder / "m.csv"), fps_max=24)
    kept = VideoTextDataset(str(folder / "m.csv"), fps_max=24, keep_in_memory=True)
    for row, (frames, height, width) in enumerate([(12, 160, 96), (24, 96, 160), (12, 96, 160)]):
        key = SampleKey(row, frames, height, width, seed=0)
        sample = dataset[key]["video"]
        assert torch.equal(sample, kept[key]["video"])
        whole = video.read_video(folder / names[[0, 1, 3][row]])[0]
        np.testing.assert_allclose((sample.permute(1, 2, 3, 0).numpy() + 1) * 127.5, whole, atol=1e-3)
    half = dataset[SampleKey(1, 12, 96, 160, seed=3)]["video"]
    shown = numbers_of((half.permute(1, 2, 3, 0).numpy() + 1) * 127.5, 24)
    assert len(set(shown)) < 12 or max(np.diff(shown)) > 1  # by time: frames occur again, or are passed over


def test_an_unknown_codec_is_a_bad_row_and_training_goes_on(folder):
    rows = {
        "path": ["odd.mp4", "named.png"],
        "text": ["a", "b"],
        "num_frames": 12,
        "height": 96,
        "width": 160,
        "fps": 24,
    }
    pd.DataFrame(rows).to_csv(folder / "t.csv", index=False)
    sample = VideoTextDataset(str(folder / "t.csv"))[SampleKey(0, 5, 96, 160, seed=0, spares=(1,))]
    assert sample["path"].endswith("named.png")
    ((row, reason),) = sample["broken"]
    assert row == 0
    assert "odd.mp4" in reason


def test_evaluation_finds_clips_by_content_and_reads_them_upright(folder, caplog):
    table = list_media(folder)
    names = [path.rsplit("/", 1)[-1] for path in table["path"]]
    assert names == ["named.png", "phone.3gp", "variable.mov"]
    assert "odd.mp4" in caplog.text
    assert "notes.txt" not in caplog.text
    clip = read_clip(EvalClip("a", str(folder / "phone.3gp"), 5, 160, 96, 2, 24.0, keep_scale=True))
    whole, _ = video.read_video(folder / "phone.3gp")
    np.testing.assert_allclose((clip.permute(1, 2, 3, 0).numpy() + 1) * 127.5, whole[0:10:2], atol=1e-3)


@pytest.mark.parametrize(
    ("fps", "fps_max", "expected"),
    [
        (24.02, 24, (24, 1)),
        (30.03, 30, (30, 1)),
        (30.03, 15, (15, 2)),
        (48.04, 24, (24, 2)),
        (24 * (1 + FPS_SLACK), 24, (24, 1)),
        (24.3, 24, (12, 2)),
        (25, 24, (12, 2)),
        (24, 23.976, (23.976, 1)),
        (23.976, 23.976, (23, 1)),
        (121, 120, (120, 1)),
        (60, 24, (20, 3)),
        (23.976, 24, (23.976, 1)),
    ],
)
def test_rates_a_little_above_are_taken_whole(fps, fps_max, expected):
    assert target_fps(fps, fps_max) == expected
    assert frame_strides(np.array([fps]), fps_max).tolist() == [expected[1]]


def test_rates_a_little_above_lose_no_frames_of_a_file(tmp_path):
    path = write_clip(tmp_path / "a.mp4", numbered(24), rate=Fraction(2402, 100), options={"crf": "5"})
    info = probe_media(path)
    assert info.fps == 24.02
    row = {"path": "a.mp4", "text": "a", "num_frames": 24, "height": 96, "width": 160, "fps": info.fps}
    pd.DataFrame([row]).to_csv(tmp_path / "t.csv", index=False)
    sample = VideoTextDataset(str(tmp_path / "t.csv"), fps_max=24)[SampleKey(0, 24, 96, 160, seed=0)]
    assert sample["text"] == "a. 24 FPS."
    assert numbers_of((sample["video"].permute(1, 2, 3, 0).numpy() + 1) * 127.5, 24) == list(range(24))


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_clip(tmp_path / "a.mp4", scene())
    pd.DataFrame({"path": ["~/a.mp4"], "text": ["a"]}).to_csv(tmp_path / "t.csv", index=False)
    assert write_meta("~/t.csv", "~/m.csv", num_workers=0) == (1, 0)
    dataset = VideoTextDataset("~/m.csv", fps_max=24)
    assert dataset[SampleKey(0, 5, 96, 160, seed=0)]["video"].shape == (3, 5, 96, 160)
    assert len(list_media("~")) == 1
    assert len(list_media("~/m.csv")) == 1
    (tmp_path / "~").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no readable videos"):
        list_media("~")  # a folder of that very name is what is meant
