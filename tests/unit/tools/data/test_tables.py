"""What comes after the stages: tables, the training CSV, funnel, histograms, sheets."""

import json
import time
from functools import partial

import polars as pl
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import read_image, save_image, save_video
from tools.data import export, sheet, stats, status, table
from tools.data.engine.tables import fill_table
from tools.data.sample_footage import texture
from tools.outputs import write_new


@pytest.fixture
def files(tmp_path):
    """Two tables that share a row."""
    pl.DataFrame({"path": ["a", "b", "c", "b"], "n": [1, 5, 3, 5], "t": ["x", "", None, ""]}).write_csv(
        tmp_path / "one.csv"
    )
    pl.DataFrame({"path": ["b", "d"], "n": [7, 8], "score": [0.5, 0.1]}).write_parquet(tmp_path / "two.parquet")
    return tmp_path


def test_a_disk_that_takes_nothing_more_is_named_with_the_table(tmp_path, monkeypatch):
    def full(*arguments):
        raise pl.exceptions.ComputeError("parquet: underlying IO error: No space left on device (os error 28)")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(UserError, match=r"^--out .*out\.parquet: No space left on device$"):
        write_new(tmp_path / "out.parquet", partial(fill_table, pl.DataFrame({"a": [1]})))
    assert not [*tmp_path.iterdir()]


def change(files, *words, inputs=("one.csv",)) -> pl.DataFrame:
    table.main([*(str(files / name) for name in inputs), "--out", str(files / "out.parquet"), "--overwrite", *words])
    return pl.read_parquet(files / "out.parquet")


def test_table_operations(files):
    two = str(files / "two.parquet")
    assert change(files, "--subtract", two)["path"].to_list() == ["a", "c"]
    both = change(files, "--intersect", two, "--dedup", "path")
    assert both.to_dicts() == [{"path": "b", "n": 5, "t": "", "score": 0.5}]
    assert change(files, "--dedup", "n,t")["path"].to_list() == ["a", "b", "c"]
    assert change(files, "--join", two)["score"].to_list() == [None, 0.5, None, 0.5]
    assert change(files, "--sort", "n")["n"].to_list() == [5, 5, 3, 1]
    assert change(files, "--sort-ascending", "n", "--head", "2")["n"].to_list() == [1, 3]
    assert change(files, "--where", "n >= 3 AND path <> 'c'")["path"].to_list() == ["b", "b"]
    assert change(files, "--columns", "n,path").columns == ["n", "path"]
    assert change(files, inputs=("one.csv", "two.parquet")).height == 6
    assert change(files, inputs=("t*.parquet",)).height == 2
    drawn = change(files, "--sample", "3", "--seed", "1")
    assert drawn.height == 3
    assert drawn.equals(change(files, "--sample", "3", "--seed", "1"))
    assert sorted(change(files, "--shuffle")["n"]) == [1, 3, 5, 5]


def test_empty_values_are_equal_to_each_other(files):
    frame = pl.DataFrame({"path": ["a", None, None, "b"], "n": [1, None, 2, None]})
    assert table.first_of_each(frame, ["path"])["n"].to_list() == [1, None, None]
    assert table.first_of_each(frame, ["path", "n"]).height == 4


def test_nothing_is_replaced_unasked(files, monkeypatch, capsys):
    """One's own files stay, an input whatever is asked; the same command twice is no mistake."""
    monkeypatch.chdir(files)
    (files / "mine.csv").write_text("mine")
    (files / "p_2.csv").write_text("mine")
    (files / "link.csv").symlink_to("one.csv")
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    for words in (["mine.csv"], ["p.csv", "--split", "2"]):
        with pytest.raises(UserError, match=r"--out (mine|p_2).csv exists and holds something else; give another name"):
            table.main(["one.csv", "--out", *words])
    for words in (["one.csv"], ["./one.csv"], ["link.csv"], ["two.parquet", "--subtract", "two.parquet"]):
        for more in ([], ["--overwrite"]):
            with pytest.raises(UserError, match=r"is the input .*, which is never replaced"):
                table.main(["one.csv", "--out", *words, *more])
    assert {name: (files / name).read_bytes() for name in before} == before
    (files / "p_1.csv").unlink()
    assert {path.name for path in files.iterdir()} == set(before)
    for _ in range(2):
        table.main(["one.csv", "--out", "new.csv", "--head", "2"])
    table.main(["two.parquet", "--out", "mine.csv", "--overwrite"])
    assert pl.read_csv("mine.csv")["path"].to_list() == ["b", "d"]


@pytest.mark.parametrize(
    "place", ["folder.csv", "one.csv/x.csv", "loop.csv", "gone.csv", "x" * 300 + ".csv", "\udcff.csv", "a\0.csv"]
)
def test_places_where_no_table_can_be(files, place):
    (files / "folder.csv").mkdir()
    (files / "loop.csv").symlink_to("loop.csv")
    (files / "gone.csv").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"^--out ") as error:
        table.main([str(files / "two.parquet"), "--out", str(files / place)])
    assert "\n" not in str(error.value)


def test_the_home_folder_has_a_short_name(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    table.main(["~/one.csv", "--out=~/home.csv", "--subtract", "~/two.parquet"])
    assert pl.read_csv(files / "home.csv")["path"].to_list() == ["a", "c"]
    assert not (files / "~").exists()


def test_clips_of_one_source_stay_together(tmp_path):
    rows = [{"path": f"{source}-{clip}", "source_id": f"s{source}"} for source in range(40) for clip in range(5)]
    frame = pl.DataFrame(rows)
    frame.write_csv(tmp_path / "all.csv")
    found = []
    for name, words in (("a", []), ("b", ["--shuffle"]), ("c", ["--seed", "1"])):
        out = tmp_path / f"{name}.csv"
        table.main([str(tmp_path / "all.csv"), "--out", str(out), "--validation", "0.1", *words])
        training, held = pl.read_csv(out), pl.read_csv(tmp_path / f"{name}_validation.csv")
        assert held.height == 20
        assert training.height == 180
        assert not set(training["source_id"]) & set(held["source_id"])
        found.append(set(held["source_id"]))
    assert found[0] == found[1] != found[2]
    more = pl.concat([frame, pl.DataFrame([{"path": f"x{n}", "source_id": f"t{n}"} for n in range(20)])])
    _, held = table.split_by_source(more, 0.1, "source_id", 0)
    assert len(found[0] - set(held["source_id"])) <= 1


def test_a_split_that_cannot_be(tmp_path):
    pl.DataFrame({"path": ["a", "b"], "source": ["s", "s"], "n": [1, None]}).write_csv(tmp_path / "t.csv")
    words = [str(tmp_path / "t.csv"), "--out", str(tmp_path / "o.csv"), "--validation", "0.5"]
    with pytest.raises(UserError, match=r"--together source_id: no such column, and clips of one source must not be"):
        table.main(words)
    with pytest.raises(UserError, match=r"--validation 0.5: 1 sources in column 'source'; two are needed"):
        table.main([*words, "--together", "source"])
    with pytest.raises(UserError, match=r"--validation 2.0: expected 0.9 or less"):
        table.main([*words, "--validation", "2"])
    with pytest.raises(UserError, match="--validation and --split: choose one"):
        table.main([*words, "--split", "2"])
    assert not (tmp_path / "o.csv").exists()
    table.main([*words, "--together", "n"])  # what is empty is one source, too
    assert (pl.read_csv(tmp_path / "o.csv").height, pl.read_csv(tmp_path / "o_validation.csv").height) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "cannot be read as a table"),
        ("twice.csv", b"path,text,text\na,b,c\n", r"cannot be read as a table \(two columns are named 'text'\)"),
        ("ragged.csv", b"path,text\na,b,c\n", "cannot be read as a table .*row 2"),
        ("not.parquet", b"PAR1PAR1", "cannot be read as a table"),
        ("text.parquet", b"hello", "cannot be read as a table"),
        ("lines.jsonl", b"{\n", "cannot be read as JSON lines"),
        ("latin.csv", b"path,text\na,\xff\xfe\n", "cannot be read as a table"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}") as error:
        table.main([str(tmp_path / name), "--out", str(tmp_path / "o.csv")])
    assert "\n" not in str(error.value)


def test_table_splits_and_converts(files):
    table.main([str(files / "two.parquet"), "--out", str(files / "new" / "p.csv"), "--split", "2"])
    parts = [pl.read_csv(files / "new" / f"p_{number}.csv") for number in (1, 2)]
    assert [part["path"].to_list() for part in parts] == [["b"], ["d"]]


def test_lists_become_text_in_a_csv(tmp_path):
    lists = pl.DataFrame({"path": ["a", "b", "c"], "phash": [["日", "2"], [], None]})
    lists.write_parquet(tmp_path / "lists.parquet")
    table.main([str(tmp_path / "lists.parquet"), "--out", str(tmp_path / "lists.csv")])
    assert pl.read_csv(tmp_path / "lists.csv")["phash"].to_list() == ['["日", "2"]', "[]", None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sort", "m"], "--sort m: no such column; there are path, n, t"),
        (["--where", "nothing > 1"], "--where 'nothing > 1'"),
        (["--where", "path > 3"], r"--where 'path > 3': [^\n]+; columns: path, n, t$"),
        (["--columns", "n,path, n"], "'n,path, n': 'n' is named twice"),
        (["--dedup", "n,n"], "'n' is named twice"),
        (["--on", "id", "--join", "one.csv"], "--on id: no such column"),
        (["--join", "gone.csv"], "no such file"),
        (["--split", "0"], "--split 0: expected 1 or more"),
        (["--head", "-1"], "--head -1: expected 0 or more"),
        (["--sample", "-1"], "--sample -1: expected 0 or more"),
        (["--on", "n", "--join", "words.csv"], "column 'n' is Int64 in one table and String in the other"),
    ],
)
def test_table_mistakes_are_named(files, words, message, monkeypatch):
    monkeypatch.chdir(files)
    pl.DataFrame({"n": ["one"]}).write_csv("words.csv")
    with pytest.raises(UserError, match=message):
        change(files, *words)


def test_five_million_rows_in_seconds(tmp_path):
    rows = 500_000  # a tenth, in a tenth of the time
    frame = pl.DataFrame({"path": pl.Series(range(rows)).cast(pl.String), "n": pl.Series(range(rows)) * 7919 % rows})
    frame.write_parquet(tmp_path / "big.parquet")
    frame[::3].write_parquet(tmp_path / "some.parquet")
    start = time.process_time()
    words = [
        "--subtract",
        str(tmp_path / "some.parquet"),
        "--dedup",
        "path",
        "--sort",
        "n",
        "--out",
        str(tmp_path / "o.parquet"),
    ]
    table.main([str(tmp_path / "big.parquet"), *words])
    assert time.process_time() - start < 3
    assert pl.read_parquet(tmp_path / "o.parquet").height == rows * 2 // 3


# ------------------------------------------------------------------------------------------------------ after a run


@pytest.fixture
def run_folder(tmp_path):
    """What a run leaves behind, in small."""
    save_video(texture(24, 40, 1)[None].repeat(6, 0), tmp_path / "clips" / "a.mp4", 24)
    save_image(texture(24, 40, 2), tmp_path / "clips" / "b.png")
    rows = {
        "path": ["raw a", "raw b", "raw c", "raw d"],
        "clip_id": ["a", "b", "c", None],
        "clip_path": ["clips/a.mp4", "clips/b.png", "clips/a.mp4", None],
        "num_frames": [6, 1, 6, None],
        "height": [24, 24, 24, None],
        "width": [40, 40, 40, None],
        "fps": [23.97602, None, 24.0, None],
        "text": ["a, b", "c", "d e f", None],
        "score_vmafmotion": [1.5, None, 0.1, None],
        "tier": ["fine", "base", None, None],
        "keep": [True, True, False, True],
        "reason": ["", "", "sharpness < 3", ""],
        "error": [None, None, None, "broken"],
        "error_stage": [None, None, None, "ingest"],
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "table.parquet")
    step = {"stage": "filter", "rows_in": 3, "rows_out": 2, "failed": 1, "done_before": 0, "finished": True}
    (tmp_path / "funnel.json").write_text(json.dumps([{**step, "dropped": {"sharpness < 3": 1}}]))
    return tmp_path


def test_training_table_is_what_training_reads(run_folder):
    from opensora.datasets.dataset import VideoTextDataset
    from opensora.datasets.source import SampleKey

    export.main([str(run_folder)])
    frame = pl.read_csv(run_folder / "train.csv")
    assert frame.columns[:8] == list(export.TRAIN_COLUMNS)
    assert frame["path"].to_list() == ["clips/a.mp4", "clips/b.png"]
    assert frame["fps"].to_list() == [23.976, None]
    assert frame["resolution"].to_list() == [960, 960]
    assert frame["aspect_ratio"].to_list() == [0.6, 0.6]
    data = VideoTextDataset(str(run_folder / "train.csv"), vmaf=True, fps_max=24)
    sample = data[SampleKey(0, 5, 16, 16, 0)]
    assert sample["video"].shape == (3, 5, 16, 16)
    assert sample["text"] == "a, b. 23.976 FPS, 2 motion score."
    assert data[SampleKey(1, 1, 16, 16, 0)]["text"] == "c"


def test_export_elsewhere_by_tier_and_mistakes(run_folder, tmp_path):
    out = tmp_path / "other" / "t.parquet"
    export.main([str(run_folder), "--out", str(out), "--tier", "fine", "--columns", "clip_id"])
    frame = pl.read_parquet(out)
    assert frame["path"].to_list() == [str(run_folder.resolve() / "clips" / "a.mp4")]
    assert frame["clip_id"].to_list() == ["a"]
    with pytest.raises(UserError, match="--tier best: no clip has it; there are base, fine"):
        export.main([str(run_folder), "--tier", "best"])
    with pytest.raises(UserError, match="--columns x: the table has path"):
        export.main([str(run_folder), "--columns", "x"])
    with pytest.raises(UserError, match="no such file; run tools/data/run.py"):
        export.main([str(tmp_path / "nowhere")])


def test_reports_replace_only_their_own(run_folder, tmp_path):
    for command in (export, stats, sheet):
        command.main([str(run_folder)])
    train = pl.read_csv(run_folder / "train.csv")
    table = pl.read_parquet(run_folder / "table.parquet")
    table.with_columns(keep=pl.col("clip_id") == "a", text=pl.lit("new")).write_parquet(run_folder / "table.parquet")
    for command in (export, stats, sheet):  # their own files of before
        command.main([str(run_folder)])
    assert pl.read_csv(run_folder / "train.csv").height < train.height
    for command, name in ((export, "train.csv"), (stats, "report/summary.csv"), (sheet, "report/kept.png")):
        (run_folder / name).write_text("mine")
        with pytest.raises(UserError, match=r"is not as it was written \(changed, or damaged\); move it away"):
            command.main([str(run_folder)])
        assert (run_folder / name).read_text() == "mine"
        command.main([str(run_folder), "--overwrite"])
        assert (run_folder / name).read_bytes() != b"mine"
    for command, name in ((export, "t.csv"), (stats, "funnel.png"), (sheet, "kept.png")):
        folder = tmp_path / command.__name__
        folder.mkdir()
        out = str(folder / name if command is export else folder)
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match="exists and holds something else"):
            command.main([str(run_folder), "--out", out])
        assert (folder / name).read_text() == "mine"
        for _ in range(2):
            command.main([str(run_folder), "--out", out, "--overwrite"])
        command.main([str(run_folder), "--out", out])
    with pytest.raises(UserError, match="table.parquet is the input"):
        export.main([str(run_folder), "--out", str(run_folder / "table.parquet"), "--overwrite"])


@pytest.mark.parametrize("content", ["", "{", "3", "[3]", '[{"stage": 1, "rows_in": "x"}]', '[{"name": 3}]'])
def test_a_damaged_funnel_is_named(run_folder, content):
    (run_folder / "funnel.json").write_text(content)
    for command in (status, stats):
        with pytest.raises(UserError, match=r"funnel.json is damaged .*; delete it and run"):
            command.main([str(run_folder)])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100, "columns"])
def test_a_damaged_result_is_named(run_folder, content):
    path = run_folder / "table.parquet"
    if content == "columns":
        pl.DataFrame({"path": ["a"]}).write_parquet(path)
    else:
        path.write_bytes(content)
    for command in (export, status, stats, sheet):
        with pytest.raises(UserError, match=r"table.parquet: (cannot be read as a table|no column 'keep')"):
            command.main([str(run_folder)])


def test_status(run_folder, capsys):
    status.main([str(run_folder)])
    out = capsys.readouterr().out
    assert "filter              3        2        1  sharpness < 3: 1" in out
    assert "raw d: ingest: broken" in out
    with pytest.raises(UserError, match=r"is .* the --output of tools/data/run.py\?"):
        status.main([str(run_folder / "clips")])


def test_funnel_and_histograms(run_folder, capsys):
    stats.main([str(run_folder)])
    for name in ("funnel.png", "histograms.png"):
        assert read_image(run_folder / "report" / name).std() > 5
    numbers = pl.read_csv(run_folder / "report" / "summary.csv")
    assert numbers.filter(pl.col("column") == "caption_words")["max"].item() == 3
    assert "3 clips, 2 kept" in capsys.readouterr().out


def test_sheets(run_folder, capsys):
    sheet.main([str(run_folder)])
    assert capsys.readouterr().out.split() == [
        str(run_folder / "report" / "kept.png"),
        str(run_folder / "report" / "dropped-sharpness-below-3.png"),
    ]
    assert read_image(run_folder / "report" / "kept.png").std() > 5
    with pytest.raises(UserError, match="--rows 0: expected 1 or more"):
        sheet.main([str(run_folder), "--rows", "0"])
    table = pl.read_parquet(run_folder / "table.parquet")
    table.with_columns(clip_path=pl.lit(None, pl.String)).write_parquet(run_folder / "table.parquet")
    with pytest.raises(UserError, match="no file became a clip; tools/data/status.py"):
        sheet.main([str(run_folder)])
