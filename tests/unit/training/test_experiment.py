"""Names of experiments, and the random stream of a step."""

import math

import torch

from opensora.training.experiment import experiment_name
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
