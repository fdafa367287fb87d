"""A failing process ends the run within seconds, every message is printed once, and SIGTERM saves first."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora.training.checkpoint.folder import list_checkpoints
from tests.parallel.checks_training import tiny_run

pytestmark = pytest.mark.parallel
ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WAITED = 1200  # seconds; processes that wait for one that is gone give up after half an hour only
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*words, program="tests/parallel/failing.py"):
    return subprocess.run(
        [*TORCHRUN, str(ROOT / program), *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=WAITED
    )


def below(process):
    """A process and all that it has started, by number."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(number for child in children for number in below(int(child)))]


def test_one_process_is_killed():
    """The others do not wait for it, and do not print what they failed in."""
    done = run("killed")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "Connection closed" not in done.stderr


def test_one_process_fails():
    """It says why, and so does the end of torchrun's report, which names no other process."""
    done = run()
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines.count("error: a mistake of one") == 1
    assert lines.count("a mistake of all") == 1
    assert lines[-2] == "  traceback : a mistake of one"
    assert "<NO_OTHER_FAILURES>" in done.stderr
    assert "Connection closed" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "lines"),
    [
        ((), 2, {"a mistake of all", "error: a mistake of one"}),
        (("killed",), 137, {"a mistake of all", "error: process 1 was ended by SIGKILL"}),
    ],
)
def test_the_package_s_launcher_adds_nothing(words, status, lines):
    launch = [sys.executable, "-m", "opensora.acceleration.launch", *TORCHRUN[3:]]
    program = str(ROOT / "tests/parallel/failing.py")
    done = subprocess.run([*launch, program, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=WAITED)
    assert (done.returncode, set(done.stderr.splitlines())) == (status, lines)


def test_autoencoder_training_says_a_mistake_once():
    done = run("configs/vae/train/demo.py", program="scripts/vae/train.py")
    assert done.returncode != 0
    told = "2 processes train an autoencoder by dividing the data"
    assert sum(line.startswith("error: ") and told in line for line in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_sigterm_to_all_processes_saves_once(tmp_path):
    """To torchrun, which passes it on, and to all below it, as schedulers do: readers of clips and ranks get two."""
    config = tiny_run(tmp_path, plugin="ddp", num_workers=1, max_steps=100_000, log_every=1)
    words = [str(ROOT / "scripts/diffusion/train.py"), str(config), "--exp-name", "run"]
    log = tmp_path / "run" / "log.txt"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*TORCHRUN, "--shutdown-timeout", str(WAITED), *words], env=ENVIRONMENT, stderr=said)
        try:
            while not (log.is_file() and "step 2/" in log.read_text()):
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.05)
            started = below(process.pid)
            assert len(started) >= 1 + 2 + 2  # torchrun, ranks, readers
            for number in started:
                with contextlib.suppress(ProcessLookupError):  # torchrun was quicker to end it
                    os.kill(number, signal.SIGTERM)
            process.wait(WAITED)
        finally:
            process.kill()
    (saved,) = list_checkpoints(tmp_path / "run")
    assert log.read_text().count("ended by SIGTERM after step") == 1
    assert str(saved) in log.read_text()
    assert not list((tmp_path / "run").glob(".*"))
    assert "RuntimeError" not in (tmp_path / "said").read_text()
