"""What torchrun says of a process."""

import runpy
import sys
from pathlib import Path

import pytest

from opensora.acceleration.torchrun import Torchrun
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[3]


def test_a_process_of_its_own():
    assert Torchrun.read({}) == Torchrun.read({"RANK": ""}) == Torchrun(0, 0, 1)


def test_one_of_several():
    assert Torchrun.read({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Torchrun(3, 1, 4)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "abc"}, {"WORLD_SIZE": "-1"}, {"LOCAL_RANK": "1.5"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}],
)
def test_what_it_never_says(environment):
    with pytest.raises(UserError, match=next(iter(environment))):
        Torchrun.read(environment)


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
