"""What torchrun says of a process."""

import runpy
import socket
import sys
from pathlib import Path

import pytest

from opensora.acceleration.failures import first_to_say
from opensora.acceleration.torchrun import Torchrun
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[3]


def test_a_process_of_its_own():
    assert Torchrun.read({}) == Torchrun.read({"RANK": ""}) == Torchrun(0, 0, 1)


def test_one_of_several():
    assert Torchrun.read({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Torchrun(3, 1, 4)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "abc"},
        {"WORLD_SIZE": "-1"},
        {"LOCAL_RANK": "1.5"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"MASTER_PORT": "99999"},
    ],
)
def test_what_it_never_says(environment):
    with pytest.raises(UserError, match=next(iter(environment))):
        Torchrun.read(environment)


def test_several_processes_need_a_place_to_meet():
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    Torchrun.check_whole(whole)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(UserError, match=f"{name} is not set, and WORLD_SIZE=2 .*torchrun"):
            Torchrun.check_whole({**whole, name: ""})


def test_nobody_is_asked_where_nobody_listens(capfd):
    """By torch, which prints pages of its own."""
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(bound.getsockname()[1])}
        assert first_to_say("a mistake", {"WORLD_SIZE": "2", **where})
    assert first_to_say("a mistake", {"WORLD_SIZE": "2"})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("script", ["diffusion/inference.py", "diffusion/train.py", "vae/train.py"])
def test_scripts_say_so_in_one_line(script, monkeypatch, capsys):
    path = str(ROOT / "scripts" / script)
    monkeypatch.setattr(sys, "argv", [path, "gone.py"])
    monkeypatch.setenv("RANK", "abc")
    monkeypatch.setattr("opensora.utils.main._end_in_order_at_sigterm", lambda: None)  # of this process: pytest's own
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(path, run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert "RANK='abc'" in line
