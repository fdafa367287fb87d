"""A failing process ends the run within seconds, and every message is printed once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "tests" / "parallel" / "failing.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parallel
def test_one_process_is_killed():
    """The others do not wait for it, and do not print what they failed in."""
    done = run("killed")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "Connection closed" not in done.stderr


@pytest.mark.parallel
def test_one_process_fails():
    done = run()
    assert done.returncode != 0
    assert done.stderr.count("a mistake of one") == 1
    assert done.stderr.count("a mistake of all") == 1
    assert "Connection closed" not in done.stderr
