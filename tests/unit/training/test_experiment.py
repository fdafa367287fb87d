"""Names of experiments, and the random stream of a step."""

import errno
import json
import math

import pytest
import torch

from opensora.config.commands import TrainOptions
from opensora.training import experiment
from opensora.training.checkpoint.folder import STATES, load_states
from opensora.training.experiment import _check_free, create_experiment, experiment_name
from opensora.training.loop import step_generator
from opensora.utils.errors import UserError


@pytest.mark.parametrize("wrong", [{"global_step": "x"}, {"epoch": None}, {"step": -1}, {"micro_step": 10**30}])
def test_states_that_no_run_has_are_named(tmp_path, wrong):
    states = dict(epoch=0, step=1, global_step=1, micro_step=1) | wrong
    (tmp_path / STATES).write_text(json.dumps(states))
    with pytest.raises(UserError, match=rf"{STATES} is not of this program \({next(iter(wrong))}="):
        load_states(tmp_path)


def test_a_folder_that_is_no_whole_checkpoint_is_not_offered(tmp_path):
    place = tmp_path / "epoch0-global_step1"
    place.mkdir()
    with pytest.raises(UserError, match=f"{place} is no whole checkpoint: move it away"):
        _check_free(tmp_path, None)
    (place / STATES).write_text("{}")
    with pytest.raises(UserError, match="already holds checkpoints"):
        _check_free(tmp_path, None)


def test_step_generator_depends_on_step_and_rank_only():
    def draw(*args):
        return torch.rand(4, generator=step_generator(*args)).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({tuple(draw(*args)) for args in [(1, 5, 0), (1, 6, 0), (1, 5, 1), (2, 5, 0)]}) == 4


def test_experiment_name_drops_what_is_not_the_configs():
    name = experiment_name("/somewhere/configs/diffusion/train/demo_cpu.py")
    assert name.split("-", 1)[1] == "diffusion_train_demo_cpu"
    assert math.isclose(len(name.split("-")[0]), 13)


def test_the_config_of_a_run_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    """Until the next one is there; it is kept under another name as well."""
    create_experiment(TrainOptions(seed=1), None, tmp_path)
    before = (tmp_path / "config.txt").read_text()

    def fail(text, path):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_text", fail)
        with pytest.raises(OSError, match="No space left"):
            create_experiment(TrainOptions(seed=2), None, tmp_path)
    assert (tmp_path / "config.txt").read_text() == before
    create_experiment(TrainOptions(seed=2), None, tmp_path)
    assert (tmp_path / "config_to_step0.txt").read_text() == before != (tmp_path / "config.txt").read_text()
