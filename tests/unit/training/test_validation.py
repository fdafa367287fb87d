"""Validation: at which times."""

import pytest
import torch

from opensora.config.commands import TrainOptions
from opensora.config.keys import read_group
from opensora.config.options import ValidationOptions
from opensora.training.diffusion import validation
from opensora.training.diffusion.validation import RowTimes, Validation, _by_condition, check_validation
from opensora.utils.errors import UserError


def test_every_row_has_a_time_in_each_bin():
    times = RowTimes([], 4)
    assert times.names == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    drawn = torch.tensor([times.of(row) for row in range(64)], dtype=torch.float64)  # [row, bin]
    edges = torch.arange(4) / 4
    assert ((drawn > edges) & (drawn < edges + 0.25)).all()
    # their mean over rows is the integral over the bin, here of the square
    exact = ((edges + 0.25) ** 3 - edges**3) / 3 / 0.25
    assert drawn.square().mean(0).tolist() == pytest.approx(exact.tolist(), abs=5e-3)  # drawn at random: 0.016
    assert RowTimes([0.1, 0.7]).of(5) == [0.1, 0.7]
    assert RowTimes([0.1, 0.7]).names == ["0.1", "0.7"]


def test_one_way_to_say_the_times():
    section = read_group(ValidationOptions, {"data_path": "x.csv", "bins": 4, "timesteps": [0.5]}, "validation")
    with pytest.raises(UserError, match="validation.bins and validation.timesteps: .* set one"):
        check_validation(TrainOptions(validation=section))


def test_bins_are_what_is_measured(monkeypatch):
    bare = object.__new__(Validation)
    bare.rows, bare.seed, bare.times, bare.own = 2, 0, RowTimes([], 3), [0, 1]
    bare.loader = [{"index": [row]} for row in (8, 5)]
    monkeypatch.setattr(bare, "_of_all_ranks", lambda own: own, raising=False)
    monkeypatch.setattr(validation, "diffusion_loss", lambda model, prepared: prepared["loss"])

    def encode(batch, generator, t):
        return {"loss": 10 * t, "conditions": None}

    found = bare(torch.nn.Identity(), encode, torch.device("cpu"), torch.float32)
    expected = [5 * sum(bare.times.of(row)[number] for row in (8, 5)) for number in range(3)]
    names = ["0-0.333", "0.333-0.667", "0.667-1"]
    assert found.pop("val_loss") == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert found == pytest.approx({f"val_loss_time/{name}": x for name, x in zip(names, expected)}, rel=1e-6)


def test_losses_by_condition():
    rows = [[(1.0, "frames"), (2.0, "frames")], [(5.0, "t2v"), (7.0, "t2v")], [(9.0, "frames"), (0.0, "frames")]]
    assert _by_condition(rows) == {"val_loss_condition/frames": 3.0, "val_loss_condition/t2v": 6.0}
    assert _by_condition([[(1.0, None)]]) == {}
