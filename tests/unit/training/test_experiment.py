"""Names of experiments, and the random stream of a step."""

import errno
import math

import pytest
import torch

from opensora.config.commands import TrainOptions
from opensora.training import experiment
from opensora.training.experiment import create_experiment, experiment_name
from opensora.training.loop import step_generator


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
