"""The commands of the data tools on footage made on the spot: whole chain, killing, going on, bad files."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
import pytest

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video
from tools.data import run, stage_run
from tools.data.engine.pipeline import Pipeline
from tools.data.engine.ray_runner import RayRunner
from tools.data.engine.runners import DIED
from tools.data.engine.stage import Stage
from tools.data.sample_footage import pan, scenery, titled

ROOT = Path(__file__).parents[2]
SIZE = (72, 128)
CONFIG = """
stages = ["ingest", "scenes", "cut", "motion", "camera", "flow", "blur", "frames", "duplicates", "filter"]
workers = 0
ingest = dict(min_seconds=0.3, min_bpp=0.0)
cut = dict(min_seconds=0.4, preset="ultrafast")
filter = dict(tiers=dict(base=dict(sharpness=[2, None])))
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config" / "tiny.py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    takes = [pan(scenery(144, 256, seed), SIZE, 12, x=1.5) for seed in range(4)]
    save_video(np.concatenate(takes[:2]), folder / "two shots.mp4", 24, crf=16)
    save_video(titled(takes[2], "HELLO"), folder / "sub" / "日本 'x'.mp4", 24, crf=16)
    save_video(takes[3], folder / "c.mp4", 24, crf=16)
    save_video(takes[3], folder / "d.mp4", 24, crf=30)
    save_image(scenery(48, 64, 9), folder / "e.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    return str(folder)


def command(config, raw, out, *words):
    run.main([config, "--input", raw, "--output", str(out), *words])
    return pl.read_parquet(Path(out) / "table.parquet")


def test_from_folder_to_training_table(config, raw, tmp_path, capsys):
    out = tmp_path / "out"
    table = command(config, raw, out)
    printed = capsys.readouterr().out
    assert "ingest              6        5        1" in printed
    assert "broken.mp4: ingest: not a readable video: broken.mp4" in printed
    assert f"5 clips: {out / 'train.csv'}" in printed
    train = pl.read_csv(out / "train.csv")
    assert train.height == 5
    assert all((out / path).is_file() for path in train["path"])
    assert train.filter(pl.col("num_frames") == 12)["camera_motion"].to_list().count("pan right") >= 3
    duplicate = table.filter(pl.col("reason") == "duplicate")
    assert [Path(path).name for path in duplicate["path"]] == ["d.mp4"]
    assert command(config, raw, out).equals(table)

    moved = tmp_path / "moved"
    out.rename(moved)
    Path(raw).rename(tmp_path / "raw2")
    shards = {path: path.stat().st_mtime_ns for path in moved.glob("stages/motion/*/part-*")}
    again = command(config, str(tmp_path / "raw2"), moved)
    for column in set(table.columns) - {"path", "mtime"}:
        assert again[column].to_list() == table[column].to_list(), column
    assert {path: path.stat().st_mtime_ns for path in moved.glob("stages/motion/*/part-*")} == shards


def test_other_settings_redo_only_what_they_touch(config, raw, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    command(config, raw, out)
    capsys.readouterr()
    command(config, raw, out, "--dry-run", "True", "--blur.frames", "3")
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert lines["blur"] == ["6", "6"]
    assert lines["motion"] == lines["frames"] == ["6", "0"]
    assert lines["filter"] == ["?", "?"]


def test_killed_and_started_again(config, raw, tmp_path):
    """SIGKILL in the middle of cutting; then the same table as without."""
    for trial in range(20):  # on a busy machine, it may have ended before it is killed
        out = tmp_path / f"killed{trial}"
        words = [sys.executable, str(ROOT / "tools" / "data" / "run.py"), config, "--input", raw, "--output", str(out)]
        process = subprocess.Popen([*words, "--workers", "0"], cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(out.glob("clips/*/*.mp4")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (out / "table.parquet").exists():
            break
    assert list(out.glob("clips/*/*.mp4"))
    assert not (out / "table.parquet").exists()
    assert command(config, raw, out).equals(command(config, raw, tmp_path / "whole"))
    assert not list(out.glob("clips/*/.*"))


def test_ten_bad_files_among_a_hundred(config, tmp_path, capsys):
    folder = tmp_path / "many"
    for number in range(90):
        save_image(np.full((8, 8 + number % 10, 3), number, np.uint8), folder / f"{number}.png")
    for number in range(10):
        (folder / f"bad {number}.mp4").write_bytes(b"bad" * number)
    table = command(config, str(folder), tmp_path / "out", "--stages", "ingest")
    assert table.filter(pl.col("error").is_not_null()).height == 10
    printed = capsys.readouterr().out
    assert all(f"bad {number}.mp4: ingest: " in printed for number in range(10))
    assert json.loads((tmp_path / "out" / "funnel.json").read_text())[0]["failed"] == 10


def test_one_stage_alone(config, raw, tmp_path):
    listing = tmp_path / "clips.csv"
    listing.write_text(f"path,text\n{raw}/c.mp4,one\n{raw}/d.mp4,two\n")
    stage_run.main(["motion", config, "--input", str(listing), "--output", str(tmp_path / "m")])
    frame = pl.read_csv(tmp_path / "m" / "motion.csv")
    assert frame.columns == ["path", "score_vmafmotion", "error"]
    assert (frame["score_vmafmotion"] > 1).all()
    stage_run.main(["scenes", config, "--input", f"{raw}", "--output", str(tmp_path / "s")])
    scenes = {
        Path(p).name: json.loads(s)
        for p, s in pl.read_csv(tmp_path / "s" / "scenes.csv").select("path", "scenes").rows()
        if s
    }
    assert scenes["two shots.mp4"] == [[0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "ingest,sceens"], "there is no stage 'sceens'; did you mean 'scenes'"),
        (["--stages", "ingest,motion"], "stage 'motion' reads column 'clip_id', which no stage before it adds"),
        (["--stages", "ingest,ingest"], "'ingest' stands twice"),
        (["--input", "nowhere"], "--input nowhere: no such folder"),
        (["--workers", "-1"], "--workers=-1: must be at least 0"),
        (["--cut.max_seconds", "0"], "--cut.max_seconds=0.0: must be .*above 0"),
        (["--cut.max_seconds", "nan"], "--cut.max_seconds=nan: must be a finite number"),
        (["--cut.crf", "99"], "--cut.crf=99: must be .*at most 51"),
        (["--cut.preset", "fastest"], "cut.preset"),
        (["--cut.min_seconds", "9"], "--cut.min_seconds 9 is above --cut.max_seconds 8: nothing would be left"),
        (["--blur.frames", "0"], "--blur.frames=0: must be at least 1"),
        (["--scenes.threshold", "500"], "--scenes.threshold 500: expected at most 100 with --scenes.method scdet"),
        (["--scenes.method", "guess"], "scenes.method"),
        (["--blur.fames", "3"], "blur.frames"),
        (["--filter.keep", "best"], "none of the tiers base"),
    ],
)
def test_mistakes_are_named_before_anything_runs(config, raw, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        command(config, raw, tmp_path / "out", *words)


def test_output_inside_the_footage_is_refused(config, raw):
    with pytest.raises(UserError, match=r"--output .*raw/out lies in --input .*raw: its clips would be taken for raw"):
        command(config, raw, Path(raw) / "out")
    assert not (Path(raw) / "out").exists()


@pytest.fixture
def ray():
    """Ray on this machine, ended after the test."""
    library = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    yield library
    library.shutdown()


def test_ray_gives_the_same(config, raw, tmp_path, ray):
    words = ["--stages", "ingest,scenes,cut,blur,frames"]
    local = command(config, raw, tmp_path / "local", *words)
    assert command(config, raw, tmp_path / "ray", *words, "--runner", "ray", "--workers", "2").equals(local)


@dataclass(frozen=True, kw_only=True)
class FragileOptions(Options):
    """Whether ``Fragile`` can start."""

    gone: bool = opt(False, "it cannot")


class Fragile(Stage):
    """Says which process did a row; 9 ends it."""

    settings: FragileOptions

    name = "fragile"
    reads = ("number",)
    adds: ClassVar = {"process": pl.Int64}

    def worker(self):
        if self.settings.gone:
            raise UserError("the weights are gone")

        def work(row):
            if row["number"] == 9:
                os._exit(1)
            return [{"process": os.getpid()}]

        return work


def test_ray_goes_on_after_a_crash_and_names_what_cannot_start(tmp_path, ray):
    numbers = pl.DataFrame({"number": range(12)})
    table = Pipeline([Fragile(FragileOptions(), tmp_path)], tmp_path, RayRunner(1), progress=False).run(numbers)
    assert table.filter(pl.col("error") == DIED)["number"].to_list() == [9]
    assert table["process"].n_unique() == 3  # one before the crash, one after it, none for the row itself
    with pytest.raises(UserError, match="stage 'fragile' cannot start: the weights are gone"):
        Pipeline([Fragile(FragileOptions(gone=True), tmp_path)], tmp_path, RayRunner(1), progress=False).run(numbers)
