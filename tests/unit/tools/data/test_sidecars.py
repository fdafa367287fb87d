"""Captions that lie beside footage."""

import json
from pathlib import Path

import polars as pl
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import save_image
from tools.data.engine.pipeline import Pipeline
from tools.data.engine.runners import LocalRunner
from tools.data.listing import list_files, read_list
from tools.data.sample_footage import texture
from tools.data.stages.ingest import Ingest, IngestOptions


@pytest.fixture
def raw(tmp_path) -> Path:
    """Five pictures, two of them in a folder below."""
    for number, name in enumerate(("a", "b", "c", "sub/d", "sub/e")):
        save_image(texture(16, 16, number), tmp_path / "raw" / f"{name}.png")
    return tmp_path / "raw"


def captions(table: pl.DataFrame) -> dict[str, str | None]:
    return {Path(path).stem: text for path, text in table.select("path", "text").rows()}


def write_lines(path: Path, *entries: dict) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), "utf-8")


def test_texts_beside_files(raw):
    (raw / "a.txt").write_text("\ufeffA circle\n  moves, slowly. \n", "utf-8")
    (raw / "sub" / "d.png.txt").write_text("日本", "utf-8")
    (raw / "b.txt").write_text(" \n")
    (raw / "notes.txt").write_bytes(b"\xff about none of them")
    found = captions(list_files(raw))
    assert found == {"a": "A circle moves, slowly.", "b": None, "c": None, "d": "日本", "e": None}


@pytest.mark.parametrize("keys", [("file_name", "text"), ("path", "caption"), ("video", "prompt")])
def test_lines_that_name_files(raw, keys, caplog):
    lines = [("a.png", "one"), ("sub/d.png", "two"), ("gone.png", "three")]
    write_lines(raw / "metadata.jsonl", *(dict(zip(keys, line)) for line in lines))
    write_lines(raw / "sub" / "more.jsonl", dict(zip(keys, ("e.png", "four"))))
    write_lines(raw / "log.jsonl", {"event": "start"}, {"event": "end"})
    (raw / "other.jsonl").write_text("not json at all\n")
    (raw / "a.txt").write_text("beside")
    with caplog.at_level("WARNING", logger="opensora"):
        found = captions(list_files(raw))
    assert found == {"a": "beside", "b": None, "c": None, "d": "two", "e": "four"}
    assert "gone.png" in caplog.text
    assert "a.png" not in caplog.text


def test_lines_that_are_not_read_are_told(raw, caplog):
    write_lines(raw / "metadata.jsonl", {"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": "two"},
                {"file_name": "b.png", "text": "twice"})  # fmt: skip
    (raw / "cut.jsonl").write_text('{"file_name": "c.png", "te\n{"file_name": "c.png", "text": "three"}\n')
    (raw / "deep.jsonl").write_text("[" * 50_000 + "\n")
    with caplog.at_level("WARNING", logger="opensora"):
        found = captions(list_files(raw))
    assert (found["a"], found["b"], found["c"]) == (None, "twice", None)
    for said in ("cut.jsonl: no captions", "deep.jsonl: no captions", "metadata.jsonl: 1 captions of files that have"):
        assert said in caplog.text


def test_no_captions_no_column(raw):
    assert "text" not in list_files(raw).columns


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}', '{"file_name": "b.png", "text": 3}', "\ud800"])
def test_a_wrong_line_is_named(raw, line):
    write_lines(raw / "m.jsonl", {"file_name": "a.png", "text": "one"})
    with (raw / "m.jsonl").open("ab") as file:
        file.write(b"\n" + line.encode("utf-8", "surrogatepass"))
    with pytest.raises(
        UserError, match=r"m.jsonl: line 3: expected an object with the name of a file under one of file_name"
    ):
        list_files(raw)


def test_what_is_no_caption(raw, caplog):
    (raw / "a.txt").write_text("word " * 5000)
    with caplog.at_level("WARNING", logger="opensora"):
        assert "text" not in list_files(raw).columns
    assert "a.txt is no caption: 24999 characters" in caplog.text
    (raw / "b.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(UserError, match=r"b.txt: not UTF-8 text"):
        list_files(raw)


def test_a_table_says_more_than_what_lies_beside(raw):
    (raw / "a.txt").write_text("beside a")
    (raw / "b.txt").write_text("beside b")
    (raw / "list.csv").write_text("path,text\na.png,of the table\nb.png,\nc.png,\n")
    assert captions(read_list(raw / "list.csv")) == {"a": "of the table", "b": "beside b", "c": None}
    (raw / "bare.csv").write_text("path\na.png\nc.png\n")
    assert captions(read_list(raw / "bare.csv")) == {"a": "beside a", "c": None}
    write_lines(raw / "list.jsonl", {"file_name": "c.png", "caption": "of a line"}, {"file_name": "b.png"})
    assert captions(read_list(raw / "list.jsonl")) == {"c": "of a line", "b": "beside b"}


def test_of_equal_files_one_with_a_caption_stays(raw):
    (raw / "z.png").write_bytes((raw / "a.png").read_bytes())
    (raw / "z.txt").write_text("of z")
    stage = Ingest(IngestOptions(), raw.parent / "out")
    table = Pipeline([stage], raw.parent / "out", LocalRunner(0), progress=False).run(list_files(raw))
    reasons = {Path(path).stem: reason for path, reason in table.select("path", "reason").rows()}
    assert reasons == {"a": "same file", "b": "", "c": "", "d": "", "e": "", "z": ""}
