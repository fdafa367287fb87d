"""Diffusion times by name and weights over them, against integrals of the densities they should have."""

import math

import pytest
import torch

from opensora.config.choices import TIME_SAMPLINGS
from opensora.config.options import LossWeightingOptions, TimeSamplingOptions
from opensora.diffusion import flow
from opensora.diffusion.times import draw_times, time_weights
from opensora.utils.errors import UserError

COUNT = 20_000
GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def drawn(count=COUNT, tokens=256, frames=1, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return draw_times(count, tokens, frames, TimeSamplingOptions(**options), generator)


def shares_below(t, bounds):
    return [(t < bound).double().mean().item() for bound in bounds]


def test_by_default_as_ever():
    expected = flow.sample_timesteps(64, 300, 5, torch.Generator().manual_seed(3))
    assert torch.equal(drawn(64, 300, 5, 3), expected)
    assert torch.equal(drawn(64, 300, 5, 3, mean=0.0, width=1.0), expected)


@pytest.mark.parametrize(("mean", "width"), [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_logit_normal_has_its_density(mean, width):
    logit = torch.log(GRID / (1 - GRID))
    density = (
        torch.exp(-((logit - mean) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi)) / (GRID * (1 - GRID))
    )
    bounds = (0.2, 0.5, 0.8)
    expected = [(density * (bound > GRID)).mean().item() for bound in bounds]
    found = shares_below(drawn(mean=mean, width=width, shift=False), bounds)
    assert found == pytest.approx(expected, abs=0.012)  # 3 deviations of a share of 20,000


def test_uniform_is_uniform_and_never_data():
    t = drawn(name="uniform", shift=False)
    assert shares_below(t, (0.25, 0.5, 0.75)) == pytest.approx([0.25, 0.5, 0.75], abs=0.012)
    assert t.min() > 0
    assert t.max() <= 1


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_is_the_inverse_of_its_distribution(scale):
    """The published map falls from 1 to 0, so the share below t is 1 - u where f(u) = t (found here by bisection)."""
    bounds, expected = (0.1, 0.3, 0.5, 0.9), []
    for bound in bounds:
        low, high = 0.0, 1.0
        for _ in range(60):
            u = (low + high) / 2
            f = 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
            low, high = (u, high) if f > bound else (low, u)
        expected.append(1 - low)
    found = drawn(name="mode", mode_scale=scale, shift=False)
    assert shares_below(found, bounds) == pytest.approx(expected, abs=0.012)
    assert 0 <= found.min() <= found.max() <= 1


def test_shift_by_resolution_or_by_hand():
    plain = drawn(100, name="uniform", shift=False)
    assert torch.equal(drawn(100, 2304, 33, name="uniform"), flow.time_shift(flow.shift_alpha(2304, 33), plain))
    assert torch.equal(drawn(100, 2304, 33, name="uniform", flow_shift=3.0), flow.time_shift(3.0, plain))
    assert torch.equal(drawn(100, 2304, 33, name="uniform", shift=False), plain)


def weights(name, **options):
    return time_weights(GRID, LossWeightingOptions(time=name, **options))


def test_cosmap_weighs_as_its_times_are_drawn():
    """The map of uniform u to 1 - 1 / (tan(pi u / 2) + 1) has the weights as its density."""
    mapped = 1 - 1 / (torch.tan(math.pi / 2 * GRID) + 1)
    for bound in (0.1, 0.4, 0.7):
        expected = (mapped < bound).double().mean()
        assert (weights("cosmap") * (bound > GRID)).mean().item() == pytest.approx(expected.item(), abs=1e-4)


def test_min_snr_cuts_the_weight_of_the_data():
    data, noise, bad = (torch.randn(5, 1000, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.98], dtype=torch.float64)[:, None]
    state, velocity = (1 - t) * data + t * noise, noise - data
    predicted = velocity + bad
    of_data = ((state - t * predicted) - data).square().mean(1)
    snr = ((1 - t) / t).square()[:, 0]
    expected = torch.minimum(snr, torch.tensor(5.0)) * of_data
    found = time_weights(t[:, 0], LossWeightingOptions(time="min_snr")) * bad.square().mean(1)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_sigma_sqrt_and_none():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert time_weights(t, LossWeightingOptions(time="sigma_sqrt")).tolist() == pytest.approx([1e6, 4.0, 1.0])
    assert time_weights(t, LossWeightingOptions()) is None


def test_names_and_bounds():
    for section, message in (
        (lambda: TimeSamplingOptions(name="normal"), "name normal: expected one of logit_normal, uniform, mode"),
        (lambda: TimeSamplingOptions(width=0.0), "width=0.0: must be above 0"),
        (lambda: TimeSamplingOptions(mode_scale=2.0), "mode_scale=2.0: must be at least -1 and at most 1.75"),
        (lambda: LossWeightingOptions(time="snr"), "time snr: expected one of cosmap, min_snr, sigma_sqrt"),
    ):
        with pytest.raises(UserError, match=message):
            section()


def test_a_density_of_ones_own(monkeypatch):
    monkeypatch.setattr(TIME_SAMPLINGS, "_added", {})
    TIME_SAMPLINGS.register("always")(lambda batch, options, generator: torch.full((batch,), options.mean))
    assert drawn(2, name="always", mean=0.25, shift=False).tolist() == [0.25, 0.25]


def test_weighted_loss_by_hand():
    pred, target = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    per_sample = [(pred[i] - target[i])[mask[i]].square().mean().item() for i in range(3)]
    found = flow.flow_matching_loss(pred, target, mask, torch.tensor([2.0, 0.0, 0.5]))
    assert found.item() == pytest.approx((2 * per_sample[0] + 0.5 * per_sample[2]) / 3, rel=1e-5)
    ones = flow.flow_matching_loss(pred, target, None, torch.ones(3))
    assert ones.item() == pytest.approx(flow.flow_matching_loss(pred, target).item(), rel=1e-6)
