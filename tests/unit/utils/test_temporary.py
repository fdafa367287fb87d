"""Temporary folders go with their programs, or with the next one."""

import multiprocessing.util
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from opensora.utils import temporary
from opensora.utils.claims import FOLDER_LOCK
from opensora.utils.temporary import LOCK, TemporaryFolder, keep_sockets, remove_forgotten
from tests.helpers.ending import ends_once


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_gone_with_its_context(place):
    with TemporaryFolder() as folder:
        assert folder.is_dir()
        assert not [*folder.iterdir()]
        (folder / "a").touch()
    assert not [*place.iterdir()]


@pytest.mark.parametrize("free", [0, 2**30])
def test_a_disk_that_is_full(place, free, monkeypatch):
    error = RuntimeError("parquet: No space left on device (os error 28)")  # as libraries written in Rust have it
    monkeypatch.setattr(temporary.shutil, "disk_usage", lambda path: SimpleNamespace(free=free if path.is_dir() else 7))
    with pytest.raises(Exception, match="No space left on device") as raised, TemporaryFolder():
        raise error
    assert getattr(raised.value, "filename", "") == ("" if free else str(place))
    assert not [*place.iterdir()]


def test_a_forked_process_lets_it_be():
    folder = TemporaryFolder()
    child = os.fork()
    if child == 0:
        del folder
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.is_dir()


def test_what_a_killed_program_left_goes(place):
    child = os.fork()
    if child == 0:
        kept = TemporaryFolder()
        try:
            (kept.path / "a").touch()
        finally:
            os._exit(0)  # nothing is tidied up
    os.waitpid(child, 0)
    left = [*place.iterdir()]
    of_user = place / "opensora-of-others"
    of_user.mkdir()
    (of_user / FOLDER_LOCK).touch()  # of a killed program that wrote its results there
    with TemporaryFolder() as first, TemporaryFolder() as second:
        assert len(left) == 1
        assert not left[0].exists()
        assert first.is_dir(), "a living program's stays"
        assert second.is_dir()
        assert (first.parent / LOCK).is_file()
    assert [path.name for path in place.iterdir()] == ["opensora-of-others"]
    assert (of_user / FOLDER_LOCK).is_file()


@pytest.mark.parametrize("call", ["mkdir", "open", "flock", "rmtree"])
def test_killed_at_any_call(call, place, monkeypatch):
    module = {"mkdir": Path, "open": os, "flock": temporary.fcntl, "rmtree": temporary.shutil}[call]
    real = getattr(module, call)

    def last(*words, **options):
        real(*words, **options)
        os._exit(0)

    child = os.fork()
    if child == 0:
        try:
            folder = TemporaryFolder() if call == "rmtree" else None
            monkeypatch.setattr(module, call, last)
            monkeypatch.setattr(temporary, "remove_forgotten", lambda parent: None)
            monkeypatch.setattr(temporary, "_soon_locked", lambda handle, how: True)
            with folder or TemporaryFolder():
                pass
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    remove_forgotten(place)
    assert not [*place.iterdir()]


def test_interrupted_while_it_is_made(place, monkeypatch):
    make = Path.mkdir

    def interrupted(*words):
        make(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TemporaryFolder()
    assert not [*place.iterdir()]


@pytest.mark.parametrize("killed", [True, False])
def test_sockets_of_multiprocessing(killed, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    with tempfile.TemporaryDirectory() as short:  # as names of sockets have to be
        monkeypatch.setattr(tempfile, "tempdir", short)
        monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
        child = os.fork()
        if child == 0:
            try:
                keep_sockets()
                assert multiprocessing.util.get_temp_dir().startswith(f"{short}/opensora-")
                assert tempfile.gettempdir() == short
                if not killed:
                    multiprocessing.util._exit_function()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert len([*Path(short).iterdir()]) == killed
        remove_forgotten(Path(short))
        assert not [*Path(short).iterdir()]


def test_an_end_while_it_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", ends_once(shutil.rmtree))
    with pytest.raises(KeyboardInterrupt), TemporaryFolder(tmp_path):
        pass
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
