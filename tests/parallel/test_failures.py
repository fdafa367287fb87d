"""A failing process ends the run within seconds, every message is printed once, and SIGTERM saves first."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from opensora.training.checkpoint.folder import list_checkpoints
from tests.helpers.forks import Program
from tests.parallel.checks_training import tiny_run

pytestmark = pytest.mark.parallel
ROOT = Path(__file__).parents[2]
FAILING = ROOT / "tests/parallel/failing.py"
WAITED = 1200  # seconds; processes that wait for one that is gone give up after half an hour only
TWO = ["--standalone", "--nproc_per_node", "2"]
FORKED = [*TWO, "--run-path", "--start-method", "fork", "--shutdown-timeout", WAITED]  # starts what it runs at once


def below(process):
    """A process and all that it has started, by number."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(number for child in children for number in below(int(child)))]


def test_one_process_fails(tmp_path):
    """It says why, and so does the end of torchrun's report, which names no other process."""
    program = Program("torch.distributed.run", *FORKED, FAILING, folder=tmp_path)
    assert program.ended(WAITED) != 0
    lines = program.said.splitlines()
    assert lines.count("error: a mistake of one") == 1
    assert lines.count("a mistake of all") == 1
    assert lines[-2] == "  traceback : a mistake of one"
    assert "<NO_OTHER_FAILURES>" in program.said
    assert "Connection closed" not in program.said


@pytest.mark.parametrize(
    ("words", "status", "lines"),
    [
        ((), 2, ["a mistake of all", "error: a mistake of one"]),
        (("killed",), 137, ["a mistake of all", "error: process 1 was ended by SIGKILL"]),
    ],
)
def test_the_package_s_launcher_adds_nothing(tmp_path, words, status, lines):
    """Nor do the others, which find that one is gone."""
    program = Program("opensora.acceleration.launch", *TWO, FAILING, *words, folder=tmp_path)
    assert program.ended(WAITED) == status, program.said
    assert sorted(program.said.splitlines()) == lines


def test_autoencoder_training_says_a_mistake_once(tmp_path):
    words = [ROOT / "scripts/vae/train.py", ROOT / "configs/vae/train/demo.py"]
    program = Program("torch.distributed.run", *FORKED, *words, folder=tmp_path)
    assert program.ended(WAITED) != 0
    told = "2 processes train an autoencoder by dividing the data"
    assert sum(line.startswith("error: ") and told in line for line in program.said.splitlines()) == 1, program.said


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_sigterm_to_all_processes_saves_once(tmp_path):
    """To torchrun, which passes it on, and to all below it, as schedulers do: readers of clips and ranks get two."""
    config = tiny_run(tmp_path, plugin="ddp", num_workers=1, max_steps=100_000, log_every=1)
    words, log = [ROOT / "scripts/diffusion/train.py", config, "--exp-name", "run"], tmp_path / "run" / "log.txt"
    program = Program("torch.distributed.run", *FORKED, *words, folder=tmp_path)
    try:
        while not (log.is_file() and "step 2/" in log.read_text()):
            assert program.process.is_alive(), program.said
            time.sleep(0.05)
        started = below(program.pid)
        assert len(started) >= 1 + 2 + 2  # torchrun, ranks, readers
        for number in started:
            with contextlib.suppress(ProcessLookupError):  # torchrun was quicker to end it
                os.kill(number, signal.SIGTERM)
        program.ended(WAITED)
    finally:
        program.kill()
    (saved,) = list_checkpoints(tmp_path / "run")
    assert log.read_text().count("ended by SIGTERM after step") == 1
    assert str(saved) in log.read_text()
    assert not list((tmp_path / "run").glob(".*"))
    assert "RuntimeError" not in program.said
