"""Guidance as weights: the same result as three branches at every step, with fewer forwards."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opensora.diffusion import velocity as velocity_module
from opensora.diffusion.flow import get_schedule
from opensora.diffusion.guidance import Branch, Guidance, count_forwards, image_scale, oscillate, phase, step_weights
from opensora.diffusion.solvers import euler, make_steps, solve
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, distilled_velocity, guided_velocity

FRAMES, TOKENS, CHANNELS, STEPS = 3, 4, 8, 50
RELEASED = Guidance(7.5, 3.0, text_osci=True, image_osci=True, scale_temporal_osci=False)


class CountingModel(nn.Module):
    """A velocity that depends on every input; counts the samples it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.calls = 0

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None):
        self.rows += len(img)
        self.calls += 1
        signal = txt.mean((1, 2)) + y_vec.mean(1) + timesteps
        return torch.tanh(0.3 * img + signal[:, None, None] + 0.5 * cond.mean(-1, keepdim=True))


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "img": randn(2, FRAMES * TOKENS, CHANNELS),
        "img_ids": randn(2, FRAMES * TOKENS, 3),
        "txt_ids": torch.zeros(2, 5, 3),
        "prompt": TextEmbeddings(randn(2, 5, 6), randn(2, 7)),
        "negative": TextEmbeddings(randn(2, 5, 6), randn(2, 7)),
        "cond": randn(2, FRAMES * TOKENS, CHANNELS + 4),
    }


def denoise(model, img, img_ids, txt_ids, prompt, negative, cond, guidance, times, has_image, on_step=None):
    """Euler steps along the guided velocity."""
    velocity = guided_velocity(
        Denoiser(model, img_ids, txt_ids, cond), prompt, negative, guidance, len(times) - 1, FRAMES, has_image
    )
    return solve(euler, velocity, img, make_steps(times), on_step)


def three_branches(model, img, img_ids, txt_ids, prompt, negative, cond, guidance, times):
    """The plain loop: all three branches at every step."""
    x, total = img, len(times) - 1
    for step in range(total):
        t = torch.full((len(x),), times[step])
        c = model(x, img_ids, prompt.txt, txt_ids, t, prompt.vec, cond)
        u = model(x, img_ids, negative.txt, txt_ids, t, negative.vec, cond)
        u2 = model(x, img_ids, negative.txt, txt_ids, t, negative.vec, torch.zeros_like(cond))
        g_txt = oscillate(guidance.text, step) if guidance.text_osci else guidance.text
        g_img = image_scale(guidance, step, total, FRAMES)
        if isinstance(g_img, torch.Tensor):
            g_img = g_img.repeat_interleave(TOKENS)[None, :, None]
        x = x + (times[step + 1] - times[step]) * (u2 + g_img * (u - u2) + g_txt * (c - u))
    return x


@pytest.mark.parametrize("has_image", [False, True])
@pytest.mark.parametrize("temporal", [False, True])
def test_same_video_with_fewer_forwards(sample, has_image, temporal):
    guidance = Guidance(7.5, 3.0, text_osci=True, image_osci=True, scale_temporal_osci=temporal and has_image)
    if not has_image:
        sample["cond"] = torch.zeros_like(sample["cond"])
    times = get_schedule(STEPS, TOKENS, FRAMES)
    expected = three_branches(CountingModel(), **sample, guidance=guidance, times=times)
    model = CountingModel()
    actual = denoise(model, **sample, guidance=guidance, times=times, has_image=has_image)
    assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert model.rows == 2 * (110 if has_image else 80)
    assert model.calls == STEPS


@pytest.mark.parametrize(("has_image", "forwards"), [(False, 80), (True, 110)])
def test_forward_count(has_image, forwards):
    assert count_forwards(RELEASED, STEPS, has_image) == forwards
    assert count_forwards(Guidance(7.5, 3.0), STEPS, has_image) == (150 if has_image else 100)
    assert count_forwards(Guidance(1.0, 1.0), STEPS, has_image) == STEPS


@pytest.mark.parametrize("step", [0, 7, 10, 11, 30])
@pytest.mark.parametrize(
    "guidance", [RELEASED, Guidance(7.5, 3.0, True, True, True), Guidance(4.0, 1.0, image_osci=True)]
)
def test_weights_sum_to_one(guidance, step):
    total = sum(weight for _, weight in step_weights(guidance, step, STEPS, FRAMES, has_image=True))
    assert_close(torch.as_tensor(total, dtype=torch.float32).expand(FRAMES), torch.ones(FRAMES))


def test_branches_of_a_step():
    def branches(guidance, step, has_image):
        return [branch for branch, _ in step_weights(guidance, step, STEPS, FRAMES, has_image)]

    every = [Branch.PROMPT, Branch.NEGATIVE, Branch.NEGATIVE_NO_IMAGE]
    assert branches(RELEASED, 0, True) == every
    assert branches(RELEASED, 11, True) == [Branch.PROMPT]
    assert branches(RELEASED, 12, False) == every[:2]
    assert branches(Guidance(7.5, 3.0, image_osci=True), 11, True) == every[:2]
    assert branches(Guidance(3.0, 3.0), 0, True) == [Branch.PROMPT, Branch.NEGATIVE_NO_IMAGE]


def test_a_phase_is_where_the_same_scales_are_on():
    phases = [phase(RELEASED, step, True) for step in range(14)]
    assert phases == [(True, True)] * 11 + [(False, False), (True, True), (False, False)]
    assert {phase(Guidance(7.5, 3.0, image_osci=True), step, False) for step in range(14)} == {(True, False)}
    for step, other in itertools.product(range(14), repeat=2):  # within one, the same branches are run
        if phases[step] == phases[other]:
            one, two = (step_weights(RELEASED, i, 14, FRAMES, True) for i in (step, other))
            assert [branch for branch, _ in one] == [branch for branch, _ in two]


def test_a_distilled_model_gets_the_scale_and_one_forward(sample):
    seen = []

    def model(img, timesteps, guidance, cond, **inputs):
        seen.append((timesteps.tolist(), guidance.tolist(), cond))
        return img

    velocity = distilled_velocity(Denoiser(model, sample["img_ids"], sample["txt_ids"]), sample["prompt"], 4.0)
    torch.testing.assert_close(velocity(sample["img"], 0.5, 3), sample["img"])
    assert seen == [([0.5, 0.5], [4.0, 4.0], None)]


def test_image_scale_grows_over_frames_and_falls_over_steps():
    guidance = Guidance(7.5, 3.0, image_osci=True, scale_temporal_osci=True)
    assert_close(image_scale(guidance, 0, STEPS, 3), torch.tensor([1.0, 2.0, 3.0]))
    assert_close(image_scale(guidance, 40, STEPS, 3), torch.tensor([1.0, 1.2, 1.4]))
    assert image_scale(guidance, 11, STEPS, 3) == 1.0


def test_large_batches_run_branch_by_branch(sample, monkeypatch):
    times = get_schedule(4, TOKENS, FRAMES)
    run = {"guidance": RELEASED, "times": times, "has_image": True}
    together = denoise(CountingModel(), **sample, **run)
    monkeypatch.setattr(velocity_module, "MAX_TOKENS_AT_ONCE", 10)
    model = CountingModel()
    assert_close(denoise(model, **sample, **run), together)
    assert model.calls == 12


def test_progress_and_cancelling(sample):
    class Cancelled(Exception):
        pass

    seen = []

    def on_step(step, total, x):
        seen.append((step, total, x.shape))
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        denoise(
            CountingModel(),
            **sample,
            guidance=RELEASED,
            times=get_schedule(5, TOKENS, FRAMES),
            has_image=True,
            on_step=on_step,
        )
    assert [item[:2] for item in seen] == [(1, 5), (2, 5)]
