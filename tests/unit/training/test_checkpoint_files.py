"""Checkpoints are whole or absent."""

import pytest
import torch

from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.checkpoint.folder import (
    RunningStates,
    find_checkpoint,
    list_checkpoints,
    load_states,
    load_weights,
    remove_old_checkpoints,
)
from opensora.training.checkpoint.writer import CheckpointWriter
from opensora.utils.errors import UserError


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    weights, writer = {"w": torch.arange(3.0)}, CheckpointWriter(tmp_path)
    for step in (1, 2, 10):
        writer.save(CheckpointContent(RunningStates(0, step, step, step), weights, {"optimizer": {"a": 1}}))
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"epoch0-global_step{s}" for s in (1, 2, 10)]
    remove_old_checkpoints(tmp_path, 2)
    assert len(list_checkpoints(tmp_path)) == 2
    newest = find_checkpoint(str(tmp_path), tmp_path.parent)
    assert load_states(newest).global_step == 10
    assert torch.equal(load_weights(newest)["w"], weights["w"])

    def full_disk(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="no space"):
        writer.save(CheckpointContent(RunningStates(0, 11, 11, 11), weights, {"optimizer": {}}), last=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch0-global_step10", "epoch0-global_step2"]
    with pytest.raises(UserError, match="neither a checkpoint"):
        find_checkpoint(str(tmp_path / "none"), tmp_path)
