"""Schedules, training times and noise."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from opensora.diffusion import flow
from opensora.diffusion.latents import get_noise, pack, prepare_ids, unpack
from opensora.utils.errors import UserError


def test_schedule_falls_from_one_to_zero():
    times = flow.get_schedule(50, 252, 33)
    assert len(times) == 51
    assert times[0] == 1
    assert times[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("tokens", "frames", "alpha"), [(252, 33, 5.733), (256, 33, 5.745), (2304, 33, 11.872), (576, 32, 6.600)]
)
def test_shift_of_released_sizes(tokens, frames, alpha):
    assert flow.shift_alpha(tokens, frames) == pytest.approx(alpha, abs=1e-3)


def test_flow_shift_replaces_everything():
    assert flow.shift_alpha(2304, 33, flow_shift=3.0) == 3.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: flow.get_schedule(0, 252, 33),
        lambda: flow.get_schedule("3", 252, 33),
        lambda: flow.get_schedule(3, 252, 33, flow_shift=-1.0),
        lambda: flow.shift_alpha(252, 33, flow_shift=math.nan),
        lambda: pack(torch.zeros(1, 4, 1, 3, 4)),
        lambda: pack(torch.zeros(4, 1, 4, 4)),
        lambda: pack(torch.zeros(1, 4, 1, 4, 4), 0),
        lambda: unpack(torch.zeros(1, 7, 16), (1, 4, 4)),
        lambda: unpack(torch.zeros(4, 16), (1, 4, 4)),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong):
    with pytest.raises(UserError, match="num_steps|flow_shift|patches"):
        wrong()


def test_sampled_times_follow_the_shifted_logit_normal():
    t = flow.sample_timesteps(20000, 256, 4, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert 0 < t.min() < t.max() < 1
    median = flow.time_shift(math.sqrt(4), 0.5)  # the median of a sigmoid of N(0, 1) is 0.5
    assert t.median().item() == pytest.approx(median, abs=0.01)


def test_sampled_times_repeat_with_their_generator():
    draws = [flow.sample_timesteps(4, 100, 3, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert_close(*draws, rtol=0, atol=0)


def test_path_ends_and_slope():
    x_0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert_close(flow.interpolate(x_0, noise, torch.ones(2)), noise)
    assert_close(flow.interpolate(x_0, noise, torch.zeros(2), sigma_min=0), x_0)
    t, dt = torch.full((2,), 0.4), 0.1
    slope = (flow.interpolate(x_0, noise, t + dt) - flow.interpolate(x_0, noise, t)) / dt
    assert_close(slope, flow.velocity(x_0, noise), atol=1e-5, rtol=1e-5)


def test_noise_depends_on_its_seed_only():
    batch = get_noise([5, 0, 9], 4, (2, 3, 3))
    for index, seed in enumerate([5, 0, 9]):
        assert_close(get_noise([seed], 4, (2, 3, 3))[0], batch[index], rtol=0, atol=0)
    assert not torch.equal(batch[0], batch[1])


def test_ids_follow_the_token_order():
    size, patch = (2, 4, 6), 2
    img_ids, txt_ids = prepare_ids(3, size, patch, txt_len=5)
    frames = torch.arange(2.0).view(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 6)
    assert_close(pack(frames, patch)[0, :, 0], img_ids[0, :, 0])
    assert img_ids.shape == (3, 2 * 2 * 3, 3)
    assert img_ids[1, 4].tolist() == [0, 1, 1]
    assert txt_ids.shape == (3, 5, 3)
    assert not txt_ids.any()
    assert_close(unpack(pack(frames, patch), size, patch), frames.contiguous())


def test_loss_without_given_frames():
    mask = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    keep = flow.unconditioned_tokens(mask, 1)
    assert keep.tolist() == [[False, True, True, False], [True] * 4, [True] * 4, [False, True, True, True]]
    assert flow.unconditioned_tokens(torch.ones(1, 1), 3).all(), "a sample must keep something"
    pred, target = torch.zeros(1, 4, 2), torch.tensor([3.0, 1, 1, 3]).view(1, 4, 1).expand(1, 4, 2)
    assert flow.flow_matching_loss(pred, target, keep[:1]).item() == pytest.approx(1)
