"""Checkpoints beside training, on a full disk, and on request."""

import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from opensora.training.checkpoint import content as checkpoint_files
from opensora.training.checkpoint import writer as checkpoint_writer
from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.checkpoint.folder import (
    RunningStates,
    find_checkpoint,
    list_checkpoints,
    load_part,
    load_states,
    load_weights,
    remove_unfinished,
)
from opensora.training.checkpoint.writer import CheckpointWriter
from opensora.training.loop import row_names
from opensora.training.stopping import StopRequest
from opensora.utils import weights_writing
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from opensora.utils.weights import load_state_dict, open_weights
from tools.convert.checkpoint import main as convert_main


def content(step: int, weight: torch.Tensor | None = None) -> CheckpointContent:
    weight = torch.full((4,), float(step)) if weight is None else weight
    state = {"state": {0: {"exp_avg": weight}}, "param_groups": [{"lr": 1.0, "betas": (0.9, 0.99)}]}
    return CheckpointContent(RunningStates(0, step, step, step), {"w": weight}, {"optimizer": state}, ema={"w": weight})


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_beside_training(tmp_path, monkeypatch):
    gate, wrote = threading.Event(), checkpoint_files.save_safetensors
    monkeypatch.setattr(checkpoint_files, "save_safetensors", lambda *args: gate.wait(10) and wrote(*args))
    writer = CheckpointWriter(tmp_path, keep_n_latest=2, asynchronous=True)
    weight = torch.ones(4)
    path = writer.save(content(1, weight))
    assert not path.exists()  # still waiting at the gate
    weight.zero_()  # training goes on
    gate.set()
    for step in (2, 3):
        writer.save(content(step))
    writer.save(content(4), last=True)
    assert names(tmp_path) == ["epoch0-global_step3", "epoch0-global_step4"]
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    weight = torch.ones(4)
    path = writer.save(content(5, weight))
    weight.zero_()
    writer.wait()
    assert load_weights(path)["w"].tolist() == [1.0] * 4
    saved = load_part(path, "optimizer")
    assert saved["state"][0]["exp_avg"].tolist() == [1.0] * 4
    assert saved["param_groups"][0]["betas"] == (0.9, 0.99)
    assert load_states(path).global_step == 5


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("part", ["save_safetensors", "torch.save"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, caplog, asynchronous, part):
    writer = CheckpointWriter(tmp_path, keep_n_latest=1, asynchronous=asynchronous)
    good = writer.save(content(1))
    writer.wait()
    before = load_weights(good)["w"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level("ERROR", logger="opensora"):
        patch.setattr(checkpoint_files.torch if part == "torch.save" else checkpoint_files, part.split(".")[-1], full)
        patch.setattr(logging.getLogger("opensora"), "propagate", True)
        writer.save(content(2))
        writer.wait()
        assert "no checkpoint was written" in caplog.text
        assert "No space left" in caplog.text
        with pytest.raises(UserError, match="last checkpoint could not be written"):
            writer.save(content(3), last=True)
    assert names(tmp_path) == [good.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [good.name]  # nothing half-written
    assert torch.equal(load_weights(good)["w"], before)
    writer.save(content(4), last=True)  # room again
    assert names(tmp_path) == ["epoch0-global_step4"]


def test_what_went_wrong_beside_training_is_said_at_the_next_step(tmp_path, monkeypatch, caplog):
    gate = threading.Event()

    def full(*_):
        gate.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_safetensors", full)
    monkeypatch.setattr(logging.getLogger("opensora"), "propagate", True)
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    writer.save(content(1))
    writer.report()
    assert not caplog.text  # still writing, and not waited for
    gate.set()
    writer._thread.join()
    writer.report()
    assert "no checkpoint was written: [Errno 28] No space left" in caplog.text
    caplog.clear()
    writer.report()
    writer.wait()
    assert not caplog.text  # once

    def broken(*_):
        raise KeyError("a fault of this program")

    monkeypatch.setattr(checkpoint_files, "save_safetensors", broken)
    writer.save(content(2))
    writer._thread.join()
    with pytest.raises(KeyError, match="a fault of this program"):
        writer.report()
    assert names(tmp_path) == []


def test_copies_stay_where_they_are():
    copies = checkpoint_files.HostCopies()
    first = {name: copies(name, torch.full((3,), 1.0)) for name in "ab"}
    copies.finish()
    again = copies("a", torch.full((3,), 2.0))
    assert again.data_ptr() == first["a"].data_ptr()
    assert again.tolist() == [2.0] * 3
    copies.finish()
    assert list(copies._kept) == ["a"]  # b is no longer saved
    assert copies("a", torch.zeros(2, 2).t()).shape == (2, 2)


def test_a_shard_is_put_together_while_one_is_written(tmp_path, monkeypatch):
    """What several ranks put together does not wait for one rank's disk."""
    read, wrote = threading.Event(), checkpoint_files.save_safetensors

    class Weights(dict):
        def items(self):
            for name, value in super().items():
                if name == "b":
                    read.set()
                yield name, value

    monkeypatch.setattr(checkpoint_files, "save_safetensors", lambda *args: read.wait(10) and wrote(*args))
    weights = Weights({name: torch.ones(10) for name in "ab"})
    writer = CheckpointWriter(tmp_path, shard_bytes=40)
    path = writer.save(CheckpointContent(RunningStates(0, 1, 1, 1), weights, {}), last=True)
    assert load_weights(path).keys() == {"a", "b"}


def test_large_weights_come_in_shards(tmp_path):
    """Names of whole files stand for their shards, wherever weights are read."""
    weights = {name: torch.randn(10) for name in "abc"}
    state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.zeros(20)}}}
    content = CheckpointContent(RunningStates(0, 1, 1, 1), weights, {"optimizer": state}, weights, metadata={"k": "v"})
    folder = CheckpointWriter(tmp_path, shard_bytes=80).save(content, last=True)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    parts = [f"-0000{i}-of-00002.safetensors" for i in (1, 2)] + [".safetensors.index.json"]
    stems = ("model/model", "ema", "optimizer/state")
    assert found == {"running_states.json", "optimizer/state.pt", *(stem + part for stem in stems for part in parts)}
    for path in (folder, folder / "model", folder / "model" / "model.safetensors", folder / "ema.safetensors"):
        stored = open_weights(path)
        assert stored.metadata["k"] == "v"
        assert all(torch.equal(value, weights[key]) for key, value in stored.tensors())
    assert load_part(folder, "optimizer")["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    convert_main([str(tmp_path), str(tmp_path / "one.safetensors"), "--ema"])
    assert load_state_dict(tmp_path / "one.safetensors").keys() == weights.keys()


def test_optimizer_states_in_one_file_are_read(tmp_path):
    """As earlier checkpoints have them."""
    (tmp_path / "optimizer").mkdir()
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, tmp_path / "optimizer" / "state.pt")
    assert load_part(tmp_path, "optimizer")["state"][0]["exp_avg"].tolist() == [1.0] * 3


def test_leftovers_of_a_killed_run_go(tmp_path):
    for doing in ("writing", "removing"):
        (tmp_path / f".epoch0-global_step7.{doing}" / "model").mkdir(parents=True)
    temporary: list[Path] = []
    write_beside(tmp_path / "samples" / "0000.mp4", lambda path: temporary.append(path) or path.touch())
    temporary[0].touch()  # as a kill before the renaming leaves it
    remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["samples", "0000.mp4"]


KILLED = 137


def in_a_process_that_dies(action):
    if (child := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


@pytest.mark.parametrize("step", [2, 1], ids=["next", "the_same_again"])
def test_killed_while_an_old_one_is_deleted(tmp_path, monkeypatch, step):
    """At any moment what has a checkpoint's name is a whole one, and the newest is there."""
    run = tmp_path / "run"
    writer = CheckpointWriter(run, keep_n_latest=1)
    writer.save(content(1))

    def killed(folder, **_):
        if folder.is_dir() and folder.name.endswith((".removing", ".replacing")):
            (folder / "running_states.json").unlink()
            os._exit(KILLED)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        in_a_process_that_dies(lambda: writer.save(content(step), last=True))
    assert find_checkpoint("latest", tmp_path) == run / f"epoch0-global_step{step}"
    assert [p.name for p in run.glob("epoch*")] == [f"epoch0-global_step{step}"]
    assert len(list(run.glob(".*"))) == 1
    remove_unfinished(run)
    assert names(run) == [f"epoch0-global_step{step}"] == [p.name for p in run.iterdir()]


def test_killed_while_one_is_replaced(tmp_path, monkeypatch):
    """Between the two renamings the old one has no name; it gets it back."""
    writer = CheckpointWriter(tmp_path)
    path = writer.save(content(1))
    rename = Path.rename

    def killed(self, target):
        if self.name.endswith(".writing"):
            os._exit(KILLED)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        in_a_process_that_dies(lambda: writer.save(content(1, torch.zeros(4)), last=True))
    assert names(tmp_path) == []
    remove_unfinished(tmp_path)
    assert load_weights(path)["w"].tolist() == [1.0] * 4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def killed_at(moment, monkeypatch):
    """Let this process die at a moment of its next checkpoint."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    def half(tensors, path, **_):
        Path(path).write_bytes(b"half a file")
        die()

    module, name, act = {
        "before a shard": (checkpoint_files, "save_safetensors", die),
        "within a shard": (weights_writing, "save_file", half),
        "before the states": (checkpoint_files.torch, "save", die),
        "before the renaming": (checkpoint_writer, "put_in_place", die),
        "before old ones go": (checkpoint_writer, "remove_old_checkpoints", die),
    }[moment]
    monkeypatch.setattr(module, name, act)


@pytest.mark.parametrize(
    "moment", ["before a shard", "within a shard", "before the states", "before the renaming", "before old ones go"]
)
def test_killed_while_one_is_written_beside_training(tmp_path, monkeypatch, moment):
    """The newest checkpoint is whole at any moment; what is left over is found and goes."""
    good = CheckpointWriter(tmp_path).save(content(1), last=True)
    child = os.fork()
    if child == 0:
        killed_at(moment, monkeypatch)
        writer = CheckpointWriter(tmp_path, 1, asynchronous=True)
        writer.save(content(2))
        writer.wait()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    done = moment == "before old ones go"
    whole = [good.name, *(["epoch0-global_step2"] if done else [])]
    assert names(tmp_path) == whole
    assert load_weights(list_checkpoints(tmp_path)[-1])["w"].tolist() == [float(len(whole))] * 4
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name not in whole] == []
    CheckpointWriter(tmp_path, 1, asynchronous=True).save(content(3), last=True)
    assert names(tmp_path) == ["epoch0-global_step3"]


@pytest.mark.parametrize("keep", [0, 1])
def test_the_checkpoint_just_written_stays(tmp_path, keep):
    for step in (1, 2):
        CheckpointWriter(tmp_path, keep_n_latest=keep).save(content(step))
    assert names(tmp_path) == ["epoch0-global_step2"]


def test_going_on_from_an_older_one(tmp_path):
    """What is written then is the newest, although steps that the run has left behind are larger."""
    run = tmp_path / "run"
    for step, keep in ((10, -1), (20, -1), (12, 2), (14, 2)):
        path = CheckpointWriter(run, keep_n_latest=keep).save(content(step))
        assert find_checkpoint("latest", tmp_path) == find_checkpoint(str(run), tmp_path) == path
        assert names(run)[-1] == path.name
    assert names(run) == ["epoch0-global_step12", "epoch0-global_step14"]


def test_states_of_another_program_are_refused(tmp_path):
    checkpoint = tmp_path / "run" / "epoch0-global_step3"
    checkpoint.mkdir(parents=True)
    for text in ('{"epoch": 0, "step": 3, "global_step": 3, "actual_update_step": 3}', "[3]", "{"):
        (checkpoint / "running_states.json").write_text(text)
        assert find_checkpoint("latest", tmp_path) == checkpoint
        with pytest.raises(UserError, match="not of this program .*--ckpt-path .*epoch0-global_step3"):
            load_states(checkpoint)


def test_a_folder_without_its_states_is_no_checkpoint(tmp_path):
    """Versions that deleted in place could leave one behind when they were killed."""
    run = tmp_path / "run"
    good = CheckpointWriter(run).save(content(1), last=True)
    (run / "epoch0-global_step2" / "model").mkdir(parents=True)
    assert find_checkpoint("latest", tmp_path) == find_checkpoint(str(run), "") == good


def test_a_run_without_an_average_is_told_so(tmp_path):
    without = CheckpointContent(RunningStates(0, 1, 1, 1), {"w": torch.ones(2)}, {})
    saved = CheckpointWriter(tmp_path).save(without, last=True)
    with pytest.raises(UserError, match="has no ema.safetensors; its run kept no EMA: .*--ema-decay None"):
        load_weights(saved, "ema")


def test_first_sigterm_is_noted():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before  # the second one acts as usual
    assert signal.getsignal(signal.SIGTERM) == before


def test_rows_are_named():
    assert row_names({"index": [0, 4], "path": ["a.mp4", "b.mp4"]}) == ["row 2 (a.mp4)", "row 6 (b.mp4)"]
    assert row_names({"path": ["a.mp4"]}) == ["a.mp4"]
    assert row_names({}) == []
