"""A run that is killed at any step and resumed equals one that never was; SIGTERM saves first."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora.registry import MODELS, build_module
from opensora.training.checkpoint.folder import list_checkpoints, load_part, load_states
from opensora.utils.weights_writing import save_safetensors
from tests.helpers.forks import FORKS, forked
from tests.helpers.held_runs import train


def run(words, log, sign=0, step=0):
    """Train, and send a signal, KILL or TERM, when the log shows a step; returns the exit status."""
    here, there = FORKS.Pipe(duplex=False)
    with here, there:
        process = forked(train, [*map(str, words)], step, here)
        while process.is_alive() and sign and not (log.is_file() and f"step {step}/" in log.read_text()):
            time.sleep(0.01)
        if sign and process.is_alive():
            os.kill(process.pid, sign)
    process.join()
    return process.exitcode


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


def test_killed_at_several_steps_and_resumed(config, tmp_path):
    whole, parts = (tmp_path / "outputs" / name for name in ("whole", "parts"))
    assert run([config, "--exp-name", "whole"], whole / "log.txt") == 0
    # a checkpoint is begun every 2 steps once the one before is there, so at step 5 that of step 2 is
    assert run([config, "--exp-name", "parts"], parts / "log.txt", signal.SIGKILL, 5) == -signal.SIGKILL
    for step in (7, 8):
        assert run([config, "--load", "latest"], parts / "log.txt", signal.SIGKILL, step) == -signal.SIGKILL
    assert run([config, "--load", "latest"], parts / "log.txt") == 0
    (a, curves_a), (b, curves_b) = outcome(whole), outcome(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)  # bitwise
    assert curves_a == curves_b
    assert list(curves_a["loss"]) == list(range(1, 10))
    assert len(list_checkpoints(parts)) == 2
    assert not list(parts.glob(".*"))


def test_sigterm_saves_and_ends(config, tmp_path):
    folder = tmp_path / "outputs" / "terminated"
    assert run([config, "--exp-name", "terminated"], folder / "log.txt", signal.SIGTERM, 3) == 143
    log = (folder / "log.txt").read_text()
    step, path = re.search(r"ended by SIGTERM after step (\d+); resume with --load (\S+)", log).groups()
    assert load_states(Path(path)).global_step == int(step) >= 3
    assert run([config, "--load", path], folder / "log.txt") == 0
    assert load_states(list_checkpoints(folder)[-1]).global_step == 9
