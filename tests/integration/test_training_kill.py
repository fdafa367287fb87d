"""A run that is killed at any step and resumed equals one that never was; SIGTERM saves first."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora.registry import MODELS, build_module
from opensora.training.checkpoint.folder import list_checkpoints, load_part, load_states
from opensora.utils.weights_writing import save_safetensors

ROOT = Path(__file__).parents[2]

# Importing takes longer than training here, so one program imports and forks a child per run. A child is sent a
# signal, KILL or TERM, when its log shows a step; however busy the machine is, it is not past the next step by then.
DRIVER = """
import json, logging, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from opensora.config import parse_config
from opensora.config.commands import TrainOptions
from opensora.training.diffusion.trainer import Trainer
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer  # what children would import

class Hold(logging.Handler):
    def __init__(self, step, pipe):
        super().__init__()
        self.words, self.pipe = f"step {step}/", pipe

    def emit(self, record):
        if record.getMessage().startswith(self.words):
            os.read(self.pipe, 1)  # until the other end is closed

def run(words, log, sign, step):
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(there)
        if sign:
            logging.getLogger("opensora.training.report.metrics").addHandler(Hold(step + 1, here))
        try:
            Trainer(parse_config(words, TrainOptions)).run()
        except SystemExit as error:
            os._exit(error.code)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(here)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if there is not None:
                os.close(there)
            return os.waitstatus_to_exitcode(status)
        if sign and there is not None and log.is_file() and f"step {step}/" in log.read_text():
            os.kill(pid, sign)
            os.close(there)
            there = None
        time.sleep(0.002)

for line in sys.stdin:
    words, log, sign, step = json.loads(line)
    print("exit", run(words, Path(log), sign, step), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    """``driver(words, log, signal, step)`` trains in a process of its own and returns its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def run(words, log, sign=0, step=0):
        process.stdin.write(json.dumps([list(map(str, words)), str(log), int(sign), step]) + "\n")
        process.stdin.flush()
        while not (line := process.stdout.readline()).startswith("exit"):
            assert line, "the driver died"
        return int(line.split()[1])

    yield run
    process.kill()  # it holds nothing
    process.wait(30)


@pytest.fixture
def config(tmp_path, diffusion_content, write_config):
    """A tiny run of 9 steps whose autoencoder comes from a file, as a resumed run needs it."""
    torch.manual_seed(0)
    ae = build_module(dict(diffusion_content["ae"]), MODELS)
    save_safetensors(ae.state_dict(), tmp_path / "ae.safetensors")
    changes = dict(
        ae={**diffusion_content["ae"], "from_pretrained": str(tmp_path / "ae.safetensors")},
        max_steps=9,
        ckpt_every=2,
        keep_n_latest=2,
        accumulation_steps=2,
        async_io=True,
        keep_encoded=True,
    )
    return write_config(tmp_path / "train.py", {**diffusion_content, **changes})


def outcome(folder):
    """Weights, average, optimizer state and losses of a finished run."""
    last = list_checkpoints(folder)[-1]
    assert load_states(last).global_step == 9
    tensors = {
        f"{name}:{k}": v for name in ("model/model", "ema") for k, v in load_file(last / f"{name}.safetensors").items()
    }
    optimizer = load_part(last, "optimizer")["state"]
    assert {"step", "exp_avg", "exp_avg_sq"} <= optimizer[0].keys()
    tensors |= {f"{i}:{k}": v for i, state in optimizer.items() for k, v in state.items()}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    curves = {name: {e.step: e.value for e in events.Scalars(name)} for name in ("loss", "grad_norm", "lr")}
    return tensors, curves


def test_killed_at_several_steps_and_resumed(driver, config, tmp_path):
    whole, parts = (tmp_path / "outputs" / name for name in ("whole", "parts"))
    assert driver([config, "--exp-name", "whole"], whole / "log.txt") == 0
    # a checkpoint is begun every 2 steps once the one before is there, so at step 5 that of step 2 is
    assert driver([config, "--exp-name", "parts"], parts / "log.txt", signal.SIGKILL, 5) == -signal.SIGKILL
    for step in (7, 8):
        assert driver([config, "--load", "latest"], parts / "log.txt", signal.SIGKILL, step) == -signal.SIGKILL
    assert driver([config, "--load", "latest"], parts / "log.txt") == 0
    (a, curves_a), (b, curves_b) = outcome(whole), outcome(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)  # bitwise
    assert curves_a == curves_b
    assert list(curves_a["loss"]) == list(range(1, 10))
    assert len(list_checkpoints(parts)) == 2
    assert not list(parts.glob(".*"))


def test_sigterm_saves_and_ends(driver, config, tmp_path):
    folder = tmp_path / "outputs" / "terminated"
    assert driver([config, "--exp-name", "terminated"], folder / "log.txt", signal.SIGTERM, 3) == 143
    log = (folder / "log.txt").read_text()
    step, path = re.search(r"ended by SIGTERM after step (\d+); go on with --load (\S+)", log).groups()
    assert load_states(Path(path)).global_step == int(step) >= 3
    assert driver([config, "--load", path], folder / "log.txt") == 0
    assert load_states(list_checkpoints(folder)[-1]).global_step == 9
