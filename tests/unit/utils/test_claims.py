"""Claims on places, by processes that wait, end and are killed."""

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora.utils.claims import NameClaims, TakenError, claimed, take
from opensora.utils.errors import UserError
from tests.helpers.ending import ends_once

ROOT = Path(__file__).parents[3]
HOLD = """
import os, sys, time
from pathlib import Path
from opensora.utils.claims import NameClaims, take
claim = take(Path(sys.argv[1]), is_folder=sys.argv[2] == "folder")
if sys.argv[2] == "folder":
    names = NameClaims(Path(sys.argv[1])).take(["a", "b"])
if "fork" not in sys.argv or os.fork() == 0:  # a child that runs has let go of what it got by the fork
    print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holding(tmp_path):
    """Starts a process that holds a place."""
    started = []

    def start(place, *words):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(place), *words],
            env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_second_is_told_who_holds_it(tmp_path, holding, kind):
    place = tmp_path / "a.csv"
    process = holding(place, kind)
    with pytest.raises(TakenError, match=rf"a\.csv is in use by process {process.pid} on .* since .*; do that"):
        take(place, kind == "folder", advice="do that")


@pytest.mark.parametrize("words", [("folder",), ("file",), ("folder", "fork")])
def test_a_killed_holder_holds_nothing(tmp_path, holding, words):
    """Nor do the processes that were forked from it."""
    place = tmp_path / "a"
    process = holding(place, *words)
    process.kill()
    process.wait()
    with claimed(place, words[0] == "folder"):
        if words[0] == "folder":
            assert NameClaims(place).holders == {}
    assert [path for path in tmp_path.rglob("*") if path != place] == []


def test_waiting(tmp_path, holding):
    process = holding(tmp_path, "folder")
    begun = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    with claimed(tmp_path, wait=True):
        assert time.monotonic() - begun > 0.4
    process.wait()


def test_names_of_running_processes(tmp_path, holding):
    process = holding(tmp_path / "folder", "folder")
    holders = NameClaims(tmp_path / "folder").holders
    assert {name: holder.pid for name, holder in holders.items()} == dict.fromkeys("ab", process.pid)


def test_nothing_is_left(tmp_path):
    with claimed(tmp_path / "new" / "folder"), claimed(tmp_path / "table.csv", is_folder=False):
        assert (tmp_path / "new" / "folder").is_dir()
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]


@pytest.mark.parametrize("module", [io, fcntl], ids=["open", "lock"])
def test_an_end_while_a_place_is_taken(tmp_path, monkeypatch, module):
    name = {io: "FileIO", fcntl: "flock"}[module]
    monkeypatch.setattr(module, name, ends_once(getattr(module, name)))
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "new"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("call", ["unlink", "rmdir"])
def test_an_end_while_a_place_is_given_back(tmp_path, monkeypatch, call, done):
    monkeypatch.setattr(Path, call, ends_once(getattr(Path, call), done=done))
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "new"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_end_while_a_place_is_given_back_leaves_the_lock_of_the_next(tmp_path, monkeypatch):
    claim, next_one, unlink = take(tmp_path), [], Path.unlink

    def pass_on(path):
        unlink(path)
        next_one.append(take(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", pass_on)
    with pytest.raises(KeyboardInterrupt):
        claim.release()
    assert next_one[0].lock.exists()


def test_names_that_no_file_system_takes(tmp_path):
    with pytest.raises(UserError, match="300 bytes"):
        take(tmp_path / ("x" * 300))
