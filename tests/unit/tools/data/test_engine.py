"""The machinery below the data tools: fingerprints, shards, runners, joining, killing and going on."""

import os
import shutil
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
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.video import save_video
from tools.data.engine.decode import clip_frames
from tools.data.engine.own_files import OwnFiles
from tools.data.engine.pipeline import Pipeline, group_stages
from tools.data.engine.runners import DIED, LocalRunner
from tools.data.engine.stage import NoOptions, PixelStage, Stage, TableStage, digest_weights
from tools.data.engine.store import StageStore


@dataclass(frozen=True, kw_only=True)
class DoubleOptions(Options):
    """What ``Double`` does."""

    factor: int = opt(1, "on top of two")
    log: str = opt("", "file for the numbers that were worked on")
    pause: float = opt(0.0, "before each", neutral=True)
    half: str = opt("", "file that is there half when the process dies", neutral=True)


class Double(Stage):
    """Doubles a number; 13 is bad luck, and 99 kills the process."""

    settings: DoubleOptions

    name = "double"
    reads = ("number", "where")
    identity = ("number",)
    adds: ClassVar = {"twice": pl.Int64}

    def worker(self):
        def work(row):
            if row["number"] == 13:
                raise UserError("13 is not allowed")
            if row["number"] == 99:
                if self.settings.half:
                    Path(self.settings.half).touch()
                os._exit(1)
            time.sleep(self.settings.pause)
            if self.settings.log:
                with Path(self.settings.log).open("a") as file:
                    file.write(f"{row['number']}\n")
            return [{"twice": 2 * row["number"] * self.settings.factor}]

        return work


class Split(Stage):
    """As many rows as ``twice`` says."""

    name = "split"
    reads = ("twice",)
    adds: ClassVar = {"part": pl.Int64, "keep": pl.Boolean, "reason": pl.String}
    expands = True

    def worker(self):
        def work(row):
            if row["twice"] == 0:
                return [{"part": None, "keep": False, "reason": "nothing"}]
            return [{"part": part, "keep": True, "reason": ""} for part in range(row["twice"])]

        return work


class Share(TableStage):
    """Each part's share of all."""

    name = "share"
    reads = ("part",)
    adds: ClassVar = {"share": pl.Float64}

    def run_table(self, table):
        return table.with_columns((pl.col("part") / pl.col("part").sum()).alias("share"))


def numbers(*values) -> pl.DataFrame:
    return pl.DataFrame(
        {"number": values, "where": [f"place {v}" for v in values]}, schema_overrides={"number": pl.Int64}
    )


def chain(root, retry=False, workers=0, **settings) -> Pipeline:
    stages = [Double(DoubleOptions(**settings), root), Split(NoOptions(), root), Share(NoOptions(), root)]
    return Pipeline(stages, root, LocalRunner(workers), retry, progress=False)


def test_rows_flow_through_the_chain(tmp_path):
    table = chain(tmp_path).run(numbers(2, 0, 13, 1))
    assert table["number"].to_list() == [2, 2, 2, 2, 0, 13, 1, 1]
    assert table["part"].to_list() == [0, 1, 2, 3, None, None, 0, 1]
    assert table["keep"].to_list() == [True] * 4 + [False] + [True] * 3
    assert table.filter(pl.col("number") == 13)["error"].to_list() == ["13 is not allowed"]
    assert table.filter(pl.col("number") == 13)["error_stage"].to_list() == ["double"]
    assert table["share"].sum() == pytest.approx(1.0)
    assert table["reason"][4] == "nothing"


def test_funnel_counts(tmp_path):
    pipeline = chain(tmp_path)
    pipeline.run(numbers(2, 0, 13, 1))
    double, split, share = pipeline.funnel
    assert (double.rows_in, double.rows_out, double.failed) == (4, 3, 1)
    assert (split.rows_in, split.rows_out, split.dropped) == (3, 6, {"nothing": 1})
    assert (share.rows_in, share.rows_out, share.finished) == (6, 6, True)


def test_only_what_is_missing_or_changed_is_done(tmp_path):
    log = tmp_path / "log"
    chain(tmp_path / "out", log=log).run(numbers(1, 2))
    first = chain(tmp_path / "out", log=log).run(numbers(1, 2, 3, 3))
    assert log.read_text().split() == ["1", "2", "3"]
    changed = chain(tmp_path / "out", log=log, factor=2).run(numbers(1, 2))
    assert changed["twice"].max() == 8
    assert log.read_text().split() == ["1", "2", "3", "1", "2"]
    again = chain(tmp_path / "out", log=log).run(numbers(1, 2, 3, 3))
    assert again.equals(first)
    assert len(log.read_text().split()) == 5


def test_leftovers_of_a_kill_go(tmp_path):
    chain(tmp_path).run(numbers(1))
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "clips" / "ab").mkdir(parents=True)
    for name in (
        ".unfinished-a1b2c3d4.parquet",
        ".unfinished-x_234567.json",
        "stages/double/.unfinished-abcdefgh.parquet",
        "clips/ab/.unfinished-abcdefgh.mp4",
    ):
        (tmp_path / name).touch()
    chain(tmp_path).run(numbers(1))
    shutil.rmtree(tmp_path / "clips")
    assert sorted(tmp_path.rglob("*")) == before


def test_hidden_files_of_others_stay(tmp_path):
    """A folder of the user's, with hidden files of all kinds, also where stages write and with names like ours."""
    names = (".keys.json", ".old.csv", ".t.parquet", "clips/.index", "frames/a/.thumb.jpg", "stages/.x.parquet")
    names += (".unfinished-notes.json", "clips/.unfinished-abcdefgh", ".unfinished-abcdefgh.txt", ".git/.x.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    chain(tmp_path).run(numbers(1))
    for name in names:
        assert (tmp_path / name).read_text() == name


@pytest.mark.parametrize("name", ["table.parquet", "funnel.json"])
def test_files_of_the_user_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} was not written by these tools"):
        chain(tmp_path).run(numbers(1))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_result_that_was_changed_is_not_replaced(tmp_path):
    first = chain(tmp_path).run(numbers(1))
    assert chain(tmp_path).run(numbers(1, 2)).height > first.height
    first.head(1).write_parquet(tmp_path / "table.parquet")
    with pytest.raises(UserError, match=r"table.parquet is not as it was written \(changed, or damaged\)"):
        chain(tmp_path).run(numbers(1))
    assert pl.read_parquet(tmp_path / "table.parquet").height == 1
    pipeline = chain(tmp_path)
    pipeline.own.overwrite = True
    assert pipeline.run(numbers(1)).equals(first)


def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    """One without a note of what was written."""
    first = chain(tmp_path).run(numbers(1))
    (tmp_path / ".written.json").unlink()
    assert chain(tmp_path).run(numbers(1)).equals(first)
    (tmp_path / ".written.json").write_text("{")
    (tmp_path / "funnel.json").write_text("[{")
    with pytest.raises(UserError, match=r"table.parquet was not written by these tools"):
        chain(tmp_path).run(numbers(1))


@pytest.mark.parametrize("kill", ["before", "after"])
def test_a_kill_between_note_and_file_leaves_both_ours(tmp_path, kill):
    own = OwnFiles(tmp_path)
    own.write_text("a.csv", "old")

    def die(path):
        path.write_text("new")
        own._note("a.csv", digest_weights(path))
        if kill == "after":
            path.replace(tmp_path / "a.csv")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.write("a.csv", die)
    OwnFiles(tmp_path).claim("a.csv")


@pytest.mark.parametrize("kind", ["file", "link loop", "dangling link", "long name", "below a file"])
def test_places_where_no_folder_can_be(tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    places = {"file": "file", "link loop": "loop", "dangling link": "gone", "long name": "x" * 300}
    with pytest.raises(UserError, match=r"^--output ") as error:
        chain(tmp_path / places.get(kind, "file/deeper")).run(numbers(1))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone", "loop"]


def test_a_stage_folder_that_is_a_file(tmp_path):
    (tmp_path / "stages").write_text("mine")
    with pytest.raises(UserError, match=r"stages is a file; give a folder"):
        chain(tmp_path).run(numbers(1))


def test_other_settings_are_named(tmp_path, caplog):
    chain(tmp_path).run(numbers(1))
    with caplog.at_level("WARNING", logger="opensora"):
        chain(tmp_path, factor=3).run(numbers(1))
    assert "double: other settings than before (factor: 1 -> 3)" in caplog.text


def test_neutral_settings_and_paths_change_nothing(tmp_path):
    stage = Double(DoubleOptions(), tmp_path)
    assert stage.fingerprint() == Double(DoubleOptions(pause=1), tmp_path / "moved").fingerprint()
    assert stage.fingerprint() != Double(DoubleOptions(factor=2), tmp_path).fingerprint()
    assert stage.key({"number": 1, "where": "a"}) == stage.key({"number": 1, "where": "b"})


def test_weights_count_by_content(tmp_path):
    class Weighted(Double):
        def weights(self):
            return [Path(self.settings.half)]

    def stage(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return Weighted(DoubleOptions(half=str(path)), tmp_path)

    one = stage("a", b"one").fingerprint()
    assert stage("a", b"two").fingerprint() != one
    assert stage("a", b"one").fingerprint() == one


def test_retry_errors(tmp_path, monkeypatch):
    assert chain(tmp_path).run(numbers(13))["error"][0] is not None

    def fixed(self):
        return lambda row: [{"twice": 26}]

    monkeypatch.setattr(Double, "worker", fixed)
    assert chain(tmp_path).run(numbers(13))["error"][0] is not None
    table = chain(tmp_path, retry=True).run(numbers(13))
    assert table["error"].to_list() == [None] * 26


def test_processes_give_the_same(tmp_path):
    values = [*range(8), 13]
    assert chain(tmp_path / "a", workers=2).run(numbers(*values)).equals(chain(tmp_path / "b").run(numbers(*values)))


def test_a_row_that_kills_its_process_is_named(tmp_path):
    half = tmp_path / "clips" / ".unfinished-half_234.mp4"
    half.parent.mkdir()
    table = chain(tmp_path, workers=2, half=half).run(numbers(1, 99, 2))
    assert not half.exists()
    assert table.filter(pl.col("number") == 99)["error"].to_list() == [DIED]
    assert set(table.filter(pl.col("error").is_null())["number"]) == {1, 2}


@dataclass(frozen=True, kw_only=True)
class ThreadsOptions(Options):
    """Which clip to decode."""

    clip: str = opt("", "a video")


class Threads(Stage):
    """How many threads a process gains by working on a video, and how many OpenCV may take."""

    settings: ThreadsOptions

    name = "threads"
    reads = ("number",)
    adds: ClassVar = {"gained": pl.Int64, "limit": pl.Int64}

    def worker(self):
        def work(row):
            import cv2

            before = len(list(Path("/proc/self/task").iterdir()))
            for _, picture in clip_frames(self.settings.clip):
                picture.rgb  # noqa: B018
            return [{"gained": len(list(Path("/proc/self/task").iterdir())) - before, "limit": cv2.getNumThreads()}]

        return work


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_processes_that_share_a_machine_use_one_thread_each(tmp_path):
    clip = save_video(np.zeros((3, 64, 96, 3), np.uint8), tmp_path / "clip.mp4", fps=24)
    stage = Threads(ThreadsOptions(clip=str(clip)), tmp_path)
    runner = LocalRunner(os.cpu_count() or 1)
    table = Pipeline([stage], tmp_path, runner, progress=False).run(numbers(1, 2))
    assert set(table["limit"]) == {1}
    assert set(table["gained"]) == {0}


def test_dry_run_does_nothing(tmp_path):
    pipeline = chain(tmp_path)
    plans = pipeline.plan(numbers(1, 2))
    assert [(p.stage, p.rows, p.pending) for p in plans] == [
        ("double", 2, 2),
        ("split", None, None),
        ("share", None, None),
    ]
    assert list(tmp_path.iterdir()) == []
    pipeline.run(numbers(1, 2))
    assert [p.pending for p in chain(tmp_path).plan(numbers(1, 2))] == [0, 0, 0]


def test_a_chain_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(UserError, match="'split' reads column 'twice', which no stage before it adds"):
        Pipeline([Split(NoOptions(), tmp_path)], tmp_path, LocalRunner(0)).run(numbers(1))


def test_one_run_per_folder(tmp_path):
    with (
        claimed(tmp_path),
        pytest.raises(UserError, match=r"is in use by process \d+ .*; wait for it or choose another"),
    ):
        chain(tmp_path).run(numbers(1))
    chain(tmp_path).run(numbers(1))
    assert not list(tmp_path.glob("*.lock"))


def test_damaged_shard_is_named(tmp_path):
    chain(tmp_path).run(numbers(1))
    (shard,) = (tmp_path / "stages" / "double").glob("*/part-*.parquet")
    shard.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"part-00000000.parquet is damaged"):
        chain(tmp_path).run(numbers(1))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PAR1", "other columns", "folder", "cut off"])
def test_damaged_results_are_named(tmp_path, content):
    chain(tmp_path).run(numbers(1))
    (shard,) = (tmp_path / "stages" / "double").glob("*/part-*.parquet")
    whole = shard.read_bytes()
    shard.unlink()
    if content == "folder":
        shard.mkdir()
    elif content == "other columns":
        pl.DataFrame({"x": [1]}).write_parquet(shard)
    else:
        shard.write_bytes(whole[: len(whole) // 2] if content == "cut off" else content)
    with pytest.raises(UserError, match=r"part-00000000.parquet is damaged .*; delete it and run again") as error:
        chain(tmp_path).run(numbers(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": 3}', b"\xff\xfe"])
def test_a_damaged_note_of_settings_costs_nothing(tmp_path, content, caplog):
    first = chain(tmp_path).run(numbers(1))
    (note,) = (tmp_path / "stages" / "double").glob("*/settings.json")
    note.write_bytes(content)
    assert chain(tmp_path).run(numbers(1)).equals(first)
    with caplog.at_level("WARNING", logger="opensora"):
        chain(tmp_path, factor=3).run(numbers(1))
    assert "double: other settings than before (which ones is not known), it runs again" in caplog.text


class Writer(Stage):
    """Writes a file per number."""

    name = "writer"
    reads = ("number",)
    adds: ClassVar = {"file": pl.String}
    files = ("file",)

    def worker(self):
        def work(row):
            (self.root / f"{row['number']}.txt").write_text("x")
            return [{"file": f"{row['number']}.txt"}]

        return work


def test_results_whose_files_were_deleted_are_made_again(tmp_path):
    def run():
        return Pipeline([Writer(NoOptions(), tmp_path)], tmp_path, LocalRunner(0), progress=False).run(numbers(1, 2))

    first = run()
    (tmp_path / "1.txt").unlink()
    kept = (tmp_path / "2.txt").stat().st_mtime_ns
    assert run().equals(first)
    assert (tmp_path / "1.txt").is_file()
    assert (tmp_path / "2.txt").stat().st_mtime_ns == kept


def test_many_shards_are_merged(tmp_path):
    store = StageStore(Double(DoubleOptions(), tmp_path))
    store.open()
    for number in range(60):
        store.add(str(number % 50), [{"twice": number}])
        store.flush()
    assert len(store.shards()) < 15
    table = store.load()
    assert table.height == 50
    assert set(table["twice"]) == set(range(10, 60))


def test_pixel_stages_share_a_pass_unless_one_reads_the_other(tmp_path):
    class A(PixelStage):
        name = "a"
        adds: ClassVar = {"x": pl.Int64}

    class B(PixelStage):
        name = "b"

    class C(PixelStage):
        name = "c"
        reads = ("clip_path", "x")

    stages = [
        A(NoOptions(), tmp_path),
        B(NoOptions(), tmp_path),
        C(NoOptions(), tmp_path),
        Double(DoubleOptions(), tmp_path),
    ]
    assert [[s.name for s in group] for group in group_stages(stages)] == [["a", "b"], ["c"], ["double"]]


KILLED = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import time
from pathlib import Path
from types import SimpleNamespace
import test_engine
import tools.data.engine.store as store
store.FLUSH_SECONDS = 0.0
rows = iter(range(5))
# stands still in the sixth row until it is killed, however late that is
test_engine.time = SimpleNamespace(sleep=lambda seconds: next(rows, None) is None and time.sleep(600))
if __name__ == "__main__":
    test_engine.chain(Path({out!r}), workers=0, pause=1.0).run(test_engine.numbers(*range(20)))
"""


def test_sigkill_and_again_gives_the_same_table(tmp_path):
    out = tmp_path / "killed"
    script = tmp_path / "run.py"
    root = Path(__file__).parents[4]
    script.write_text(KILLED.format(root=str(root), here=str(Path(__file__).parent), out=str(out)))
    process = subprocess.Popen([sys.executable, str(script)])
    while process.poll() is None and len(list(out.glob("stages/double/*/part-*"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = StageStore(Double(DoubleOptions(), out))
    assert 0 < store.load().height < 20
    (store.folder / ".unfinished-half_234.parquet").write_bytes(b"half")
    assert chain(out).run(numbers(*range(20))).equals(chain(tmp_path / "whole").run(numbers(*range(20))))
    assert not list(out.glob("stages/*/*/.*"))
