"""Files and folders that are whole or absent."""

import fcntl
import io
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from opensora.utils.errors import UserError
from opensora.utils.files import (
    FileBeside,
    naming,
    put_in_place,
    remove_unfinished_files,
    remove_unfinished_folders,
    temporary_path,
    write_beside,
    write_json,
    write_text,
)
from opensora.utils.main import told_of
from tests.helpers.ending import ends_once


def folder(path, text):
    write_text(text, path / "file")
    return path


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text("old", tmp_path / "a.txt")

    def fail(path):
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_beside(tmp_path / "a.txt", fail)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.mark.parametrize("module", [io, fcntl], ids=["open", "lock"])
def test_an_end_while_a_file_is_opened(tmp_path, monkeypatch, module):
    name = {io: "FileIO", fcntl: "flock"}[module]
    monkeypatch.setattr(module, name, ends_once(getattr(module, name)))
    with pytest.raises(KeyboardInterrupt):
        write_text("new", tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_a_copy_to_a_full_disk_is_about_the_copy(tmp_path):
    def fail(path):
        raise OSError(28, "No space left on device", tmp_path / "source", None, path)

    with pytest.raises(OSError, match="No space left") as raised:
        write_beside(tmp_path / "a.txt", fail)
    assert raised.value.filename == str(tmp_path / "a.txt")
    error = OSError(28, "No space left on device", "source", None, tmp_path / ".out.writing" / "b")
    assert told_of(error) == f"{tmp_path}/out/b: No space left on device"


def test_a_place_for_errors_that_name_none():
    with pytest.raises(OSError, match="a/b"), naming("a/b"):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="c") as raised, naming("a/b"):
        raise OSError(28, "No space left on device", "c")
    assert raised.value.filename == "c"
    with pytest.raises(OSError, match="Broken pipe") as raised, naming("a/b"):
        raise BrokenPipeError(32, "Broken pipe")
    assert raised.value.filename is None


@pytest.mark.parametrize(
    "error", [RuntimeError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")]
)
def test_a_full_disk_is_named_whatever_library_finds_it(tmp_path, error):
    def fail(path):
        raise error

    with pytest.raises(OSError, match="No space left") as raised:
        write_beside(tmp_path / "a.txt", fail)
    assert (raised.value.errno, raised.value.filename) == (28, str(tmp_path / "a.txt"))
    assert not list(tmp_path.iterdir())


def test_nobody_hears_of_the_temporary_name(tmp_path):
    def fail(path):
        raise OSError(28, "No space left on device", path)

    with pytest.raises(OSError, match="No space left") as raised:
        write_beside(tmp_path / "a.png", fail)
    assert raised.value.filename == str(tmp_path / "a.png")

    def refuse(path):
        raise UserError(f"{path}: no such format")

    with pytest.raises(UserError, match=rf"^{tmp_path}/b.png: no such format$"):
        write_beside(tmp_path / "b.png", partial(write_beside, write=refuse))


def test_bytes_of_a_file_name_that_are_no_text_are_escaped(tmp_path):
    """And found again by whoever reads the JSON."""
    name = os.fsdecode(b"caf\xc3\xa9 \xff")
    path = write_text(json.dumps(name, ensure_ascii=False), tmp_path / "a.json")
    assert json.loads(path.read_text(encoding="utf-8")) == name


def test_a_name_with_a_zero_byte(tmp_path):
    with pytest.raises(UserError, match="zero byte"):
        write_text("a", tmp_path / "a\0b")


def test_what_a_killed_program_was_writing_is_written_over(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            FileBeside(tmp_path / "a.txt").temporary.write_text("half of something long")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert len([*tmp_path.iterdir()]) == 1
    write_text("new", tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_two_write_one_file_at_a_time(tmp_path):
    one, other = FileBeside(tmp_path / "a.txt"), FileBeside(tmp_path / "a.txt")
    assert one.temporary != other.temporary
    for file, text in ((one, "one"), (other, "other")):
        file.temporary.write_text(text)
        assert file.put_in_place().read_text() == text
    one, other = FileBeside(tmp_path / "a.txt"), FileBeside(tmp_path / "b.txt")
    one.discard()
    other.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_beside(tmp_path / "a.txt", lambda path: (tmp_path / "gone").read_text())
    assert raised.value.filename == str(tmp_path / "gone")


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128])
def test_names_that_no_file_system_takes(tmp_path, name):
    with pytest.raises(UserError, match="256 bytes"):
        write_json({}, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path):
    old = folder(tmp_path / "a", "old")
    with pytest.raises(OSError):
        put_in_place(tmp_path / "absent", old)
    assert (old / "file").read_text() == "old"
    put_in_place(folder(temporary_path(old, "writing"), "new"), old)
    assert [(p.name, (p / "file").read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(("module", "call", "at"), [(Path, "rename", 0), (Path, "rename", 1), (shutil, "rmtree", 1)])
def test_an_end_while_a_folder_is_put_in_place_leaves_one_of_the_two(tmp_path, monkeypatch, module, call, at, done):
    old = folder(tmp_path / "a", "old")
    written = folder(temporary_path(old, "writing"), "new")
    monkeypatch.setattr(module, call, ends_once(getattr(module, call), at, done))
    with pytest.raises(KeyboardInterrupt):
        put_in_place(written, old)
    is_new = module is shutil or (at == 1 and done)
    left = {p.name: (p / "file").read_text() for p in tmp_path.iterdir()}
    assert left == ({"a": "new"} if is_new else {"a": "old", written.name: "new"})


def test_leftovers(tmp_path):
    """Of every kind and age; what has other names stays."""
    for doing in ("writing", "removing", "replacing"):
        folder(tmp_path / f".a1.{doing}", doing)
    folder(tmp_path / "a2", "whole")
    folder(tmp_path / ".a2.replacing", "older")
    for name in (".unfinished-1.mp4", "below/.unfinished-2.json", "00001.safetensors.partial", "mine.partial"):
        write_text("", tmp_path / name)
    remove_unfinished_folders(tmp_path, "a*")
    remove_unfinished_files(tmp_path, "[0-9]*.safetensors.partial")
    left = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"a1/file": "replacing", "a2/file": "whole", "mine.partial": ""}
