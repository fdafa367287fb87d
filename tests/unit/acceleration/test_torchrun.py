"""What torchrun says of a process."""

import os
import subprocess
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
def test_scripts_say_so_in_one_line(script):
    words = [sys.executable, str(ROOT / "scripts" / script), "gone.py"]
    environment = {**os.environ, "RANK": "abc", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "RANK='abc'" in line
