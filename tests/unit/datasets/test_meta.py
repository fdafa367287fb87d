"""Columns that come from the files themselves."""

import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from opensora.datasets.meta import META_COLUMNS, probe_media, write_meta
from opensora.datasets.video_io import BrokenMediaError
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video

SCRIPT = Path(__file__).parents[3] / "scripts" / "cnv" / "meta.py"


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A clip, a picture, a file of zeros, and a table that also names a missing one."""
    save_video(noise(17, 32, 48, 3), tmp_path / "a.mp4", fps=24000 / 1001)
    save_image(noise(20, 40, 3), tmp_path / "b.png")
    (tmp_path / "zeros.mp4").write_bytes(bytes(1000))
    names = ["a.mp4", "zeros.mp4", "b.png", "gone.mp4"]
    pd.DataFrame({"path": names, "text": ["None", "b", "007", "d"]}).to_csv(tmp_path / "clips.csv", index=False)
    return tmp_path


def test_columns_come_from_headers(folder):
    assert write_meta(folder / "clips.csv", folder / "out.csv", num_workers=0) == (2, 2)
    table = pd.read_csv(folder / "out.csv")
    assert list(table.columns) == ["path", "text", *META_COLUMNS]
    assert (folder / "out.csv").read_text().splitlines()[1].startswith("a.mp4,None,")
    assert (folder / "out.csv").read_text().splitlines()[2].startswith("b.png,007,")
    clip, picture = table.to_dict("records")
    assert (clip["path"], clip["num_frames"], clip["height"], clip["width"]) == ("a.mp4", 17, 32, 48)
    assert (clip["fps"], clip["resolution"]) == (23.976, 32 * 48)
    assert clip["aspect_ratio"] == pytest.approx(32 / 48)
    assert (picture["num_frames"], picture["height"], picture["width"]) == (1, 20, 40)
    assert np.isnan(picture["fps"])
    broken = pd.read_csv(folder / "out_broken.csv")
    assert broken["row"].tolist() == [3, 5]
    assert "no such file" in broken["error"][1]
    assert "zeros.mp4" in broken["error"][0]
    write_meta(folder / "clips.csv", folder / "out.parquet", num_workers=0)  # replaces the list, which is its own
    (folder / "out_broken.csv").write_text("path,text\n")
    (folder / "out.parquet").unlink()
    with pytest.raises(UserError, match="out_broken.csv exists already"):
        write_meta(folder / "clips.csv", folder / "out.parquet", num_workers=0)


def test_a_lying_header_is_counted(folder):
    whole = save_video(noise(60, 64, 64, 3), folder / "long.mkv", fps=10)  # mkv headers hold no number of frames
    assert probe_media(whole).num_frames == 60
    cut = folder / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert 10 < probe_media(cut).num_frames < 50
    with av.open(str(folder / "front.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for picture in noise(60, 64, 64, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = folder / "front.mp4"  # the header comes first, and still names 60 frames when the end is lost
    assert probe_media(whole).num_frames == 60
    (folder / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert 10 < probe_media(folder / "half.mp4").num_frames < 50
    with pytest.raises(BrokenMediaError, match="zeros.mp4"):
        probe_media(folder / "zeros.mp4")


def test_parquet_other_folder_and_workers(folder, tmp_path_factory):
    pd.read_csv(folder / "clips.csv").loc[[0, 2] * 20].to_parquet(folder / "clips.parquet")
    target = tmp_path_factory.mktemp("elsewhere") / "meta.parquet"
    assert write_meta(folder / "clips.parquet", target, num_workers=2) == (40, 0)
    table = pd.read_parquet(target)
    assert table["path"][0] == str(folder / "a.mp4")  # would not be found from the new folder otherwise
    assert table["num_frames"].tolist() == [17, 1] * 20


def test_other_columns_stay_as_they_are_written(folder):
    rows = ["a.mp4,007,1.50,NA,9007199254740993", "a.mp4,12,true,,null"]
    (folder / "own.csv").write_text("\n".join(["path,id,share,note,number", *rows]) + "\n")
    assert write_meta(folder / "own.csv", folder / "own_meta.csv", 0) == (2, 0)
    lines = (folder / "own_meta.csv").read_text().splitlines()
    assert [line.split(",")[:5] for line in lines[1:]] == [row.split(",") for row in rows]


def test_mistakes_are_named(folder):
    pd.DataFrame({"path": ["gone.mp4"]}).to_csv(folder / "none.csv", index=False)
    with pytest.raises(UserError, match="none of its 1 files is readable"):
        write_meta(folder / "none.csv", folder / "x.csv", 0)
    write_meta(folder / "clips.csv", folder / "out.csv", 0)
    with pytest.raises(UserError, match="exists already"):
        write_meta(folder / "clips.csv", folder / "out.csv", 0)
    write_meta(folder / "clips.csv", folder / "out.csv", 0, overwrite=True)
    with pytest.raises(UserError, match="not a table format"):
        write_meta(folder / "clips.csv", folder / "out.txt", 0)


def test_bad_input_ends_with_status_2(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["meta.py", "--input", str(folder / "no.csv"), "--output", str(folder / "o.csv")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "no such file" in capsys.readouterr().err
