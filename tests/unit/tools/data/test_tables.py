"""What comes after the stages: tables, the training CSV, funnel, histograms, sheets."""

import json
import time

import polars as pl
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import read_image, save_image, save_video
from tools.data import export, sheet, stats, status, table
from tools.data.sample_footage import texture


@pytest.fixture
def files(tmp_path):
    """Two tables that share a row."""
    pl.DataFrame({"path": ["a", "b", "c", "b"], "n": [1, 5, 3, 5], "t": ["x", "", None, ""]}).write_csv(
        tmp_path / "one.csv"
    )
    pl.DataFrame({"path": ["b", "d"], "n": [7, 8], "score": [0.5, 0.1]}).write_parquet(tmp_path / "two.parquet")
    return tmp_path


def change(files, *words, inputs=("one.csv",)) -> pl.DataFrame:
    table.main([*(str(files / name) for name in inputs), "--out", str(files / "out.parquet"), *words])
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
