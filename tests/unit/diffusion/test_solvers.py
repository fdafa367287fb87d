"""Solvers: their order, what they do at jumps of the guidance, and the forwards they cost."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from opensora.config.commands import SamplingOption
from opensora.diffusion.guidance import Guidance, phase, step_weights
from opensora.diffusion.plan import LatentSpec, make_plan
from opensora.diffusion.solvers import SOLVERS, evaluations, make_steps, solve
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, distilled_velocity, guided_velocity
from opensora.utils.errors import UserError
from tests.unit.diffusion.test_guidance import CHANNELS, FRAMES, RELEASED, TOKENS, CountingModel, sample

__all__ = ["sample"]

ORDERS = {"euler": 1, "heun": 2, "ab2": 2}
SHIPPED = list(ORDERS)


def times_of(num_steps, alpha=2.0):
    """Shifted times from 1 to 0."""
    return [alpha * t / (1 + (alpha - 1) * t) for t in (1 - i / num_steps for i in range(num_steps + 1))]


def run(name, velocity, x, times, phases=None):
    return solve(SOLVERS.get(name), velocity, x, make_steps(times, phases))


def turning(x, t, step):
    """dx/dt of x = (cos, sin) of an angle that is the sine of 3t, on a spiral: known in closed form."""
    rate = 3 * math.cos(3 * t)
    return torch.stack((-rate * x[..., 1] + 0.5 * x[..., 0], rate * x[..., 0] + 0.5 * x[..., 1]), -1)


def turned(t):
    angle, size = math.sin(3 * t), math.exp(0.5 * t)
    return torch.tensor([[[size * math.cos(angle), size * math.sin(angle)]]], dtype=torch.float64)


def observed_order(errors):
    return [math.log2(one / two) for one, two in itertools.pairwise(errors)]


def test_every_shipped_solver_has_its_order_tested():
    assert {*SHIPPED, "renoise"} == set(SOLVERS.places)


def test_renoise_draws_by_the_starting_noise_alone():
    """With the exact velocity of data at one point every step predicts it; between steps there is its noise, which
    neither batch nor dtype changes, and which is none of the noise before."""
    point, times = torch.tensor([3.0, -2.0]), [1.0, 0.6, 0.3, 0.0]
    states = []

    def run_from(noise):
        states.clear()
        keep = lambda step, total, x: states.append(x)  # noqa: E731
        exact = lambda x, t, step: (x - point) / t  # noqa: E731
        return solve(SOLVERS.get("renoise"), exact, noise, make_steps(times), keep)

    noise = torch.randn(500, 40, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run_from(noise), point.expand(500, 40, 2))
    drawn = [(state - (1 - t) * point) / t for state, t in zip(states[:2], times[1:3])]
    assert [each.std().item() for each in drawn] == pytest.approx([1, 1], abs=0.02)
    for one, other in ((drawn[0], drawn[1]), (drawn[0], noise)):
        assert abs((one * other).mean()) < 0.03  # 40,000 numbers: 6 deviations
    together = states[0][7:8].clone()
    run_from(noise[7:8])
    assert torch.equal(states[0], together)
    assert evaluations(SOLVERS.get("renoise"), make_steps(times)) == [0, 1, 2]


@pytest.mark.parametrize("name", SHIPPED)
def test_order(name):
    """Half the step, half the error to the power of the order; over the whole time, ends included."""
    errors = [(run(name, turning, turned(1.0), times_of(n)) - turned(0.0)).norm().item() for n in (80, 160, 320, 640)]
    assert observed_order(errors)[-1] == pytest.approx(ORDERS[name], abs=0.2)
    assert errors[-1] < 1e-2


@pytest.mark.parametrize("name", SHIPPED)
def test_straight_paths_are_exact(name):
    """A velocity that does not change needs one step: rectified flow's ideal."""
    x, v = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    for n in (1, 2, 7):
        assert_close(run(name, lambda x, t, step: v, x, times_of(n)), x - v)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_jump_of_the_field_does_not_cost_the_order(name):
    """Two fields, one after the other: each is followed by its own velocities only."""

    def field(scale, x, t):
        return scale * torch.cos(3 * t * torch.ones_like(x)) * x

    def exact(scale, x, start, end):
        return x * math.exp(scale * (math.sin(3 * end) - math.sin(3 * start)) / 3)

    x, errors = torch.ones(1, 1, 1, dtype=torch.float64), []
    for n in (80, 160, 320):
        scales = [2.0 if step < n // 2 else -3.0 for step in range(n)]
        times = times_of(n, alpha=1.0)
        asked = []

        def velocity(x, t, step, scales=scales, asked=asked):
            asked.append((t, step))
            return field(scales[step], x, t)

        expected = exact(-3.0, exact(2.0, x, 1.0, 0.5), 0.5, 0.0)
        errors.append((run(name, velocity, x, times, scales) - expected).abs().item())
        for t, step in asked:  # a field is asked for between the times where it rules
            assert (0.5 <= t <= 1) if scales[step] == 2.0 else (0 <= t <= 0.5)
    assert observed_order(errors)[-1] == pytest.approx(ORDERS[name], abs=0.25)


@pytest.mark.parametrize("name", SHIPPED)
def test_fields_that_take_turns_are_not_mixed(name):
    """Two constant fields step by step: the exact sum. An extrapolation from one to the other would overshoot."""
    times = times_of(12)
    scales = [step % 2 for step in range(12)]
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    expected = sum((after - now) * scale for (now, after), scale in zip(itertools.pairwise(times), scales))
    assert run(name, lambda x, t, step: torch.full_like(x, scales[step]), x, times, scales).item() == pytest.approx(
        expected
    )


def old_loop(model, img, img_ids, txt_ids, prompt, negative, cond, times, guidance, has_image):
    """Euler's loop with guidance inside, as it was before solvers were apart."""
    x = img.float()
    scale = torch.full((len(img),), guidance.text)
    for step, (now, after) in enumerate(itertools.pairwise(times)):
        weights = step_weights(guidance, step, len(times) - 1, FRAMES, has_image)
        velocity = torch.zeros_like(x)
        texts = [prompt if branch.name == "PROMPT" else negative for branch, _ in weights]
        conds = [torch.zeros_like(cond) if branch.name == "NEGATIVE_NO_IMAGE" else cond for branch, _ in weights]
        n = len(weights)
        predictions = model(
            torch.cat([x] * n),
            torch.cat([img_ids] * n),
            torch.cat([text.txt for text in texts]),
            torch.cat([txt_ids] * n),
            torch.full((n * len(x),), now),
            torch.cat([text.vec for text in texts]),
            torch.cat(conds),
            torch.cat([scale] * n),
        )
        for prediction, (_, weight) in zip(predictions.chunk(n), weights):
            if isinstance(weight, torch.Tensor):
                weight = weight.repeat_interleave(TOKENS)[None, :, None]
            velocity += weight * prediction
        x = x + (after - now) * velocity
    return x


def guided(model, inputs, guidance, times, has_image, solver="euler"):
    """A run of the shipped parts: velocity, phases, solver."""
    denoiser = Denoiser(model, inputs["img_ids"], inputs["txt_ids"], inputs["cond"])
    total = len(times) - 1
    velocity = guided_velocity(
        denoiser, inputs["prompt"], inputs["negative"], guidance, total, FRAMES, has_image=has_image
    )
    phases = [phase(guidance, step, has_image) for step in range(total)]
    return solve(SOLVERS.get(solver), velocity, inputs["img"], make_steps(times, phases))


def without_image(inputs):
    return {**inputs, "cond": torch.zeros_like(inputs["cond"])}


@pytest.mark.parametrize("has_image", [False, True])
@pytest.mark.parametrize("temporal", [False, True])
def test_euler_is_the_old_loop_bit_for_bit(sample, has_image, temporal):
    inputs = sample if has_image else without_image(sample)
    guidance, times = dataclasses.replace(RELEASED, scale_temporal_osci=temporal), times_of(14)
    expected = old_loop(CountingModel(), **inputs, times=times, guidance=guidance, has_image=has_image)
    assert torch.equal(guided(CountingModel(), inputs, guidance, times, has_image), expected)


@pytest.mark.parametrize("has_image", [False, True])
@pytest.mark.parametrize(
    "guidance",
    [Guidance(3.0, 1.5), dataclasses.replace(RELEASED, image_osci=False, scale_temporal_osci=True, text_osci=False)],
)
@pytest.mark.parametrize("name", SHIPPED)
def test_guided_order(sample, name, guidance, has_image):
    """The order stands with guidance, also with an image scale that falls from step to step."""
    inputs = sample if has_image else without_image(sample)

    class Exact(CountingModel):
        def forward(self, img, *args, **kwargs):
            return super().forward(img.double(), *args, **kwargs).double()

    def final(solver, n):
        x = guided(Exact(), double(inputs), guidance, times_of(n), has_image, solver)
        return x.double()

    reference = final("heun", 640)
    errors = [(final(name, n) - reference).norm().item() for n in (20, 40, 80)]
    assert observed_order(errors)[-1] == pytest.approx(ORDERS[name], abs=0.35)


def double(inputs):
    """Inputs in float64, so that rounding does not hide the order."""

    def convert(value):
        if isinstance(value, TextEmbeddings):
            return TextEmbeddings(value.txt.double(), value.vec.double())
        return value.double()

    return {key: convert(value) for key, value in inputs.items()}


def option(**changes):
    size = {"resolution": "256px", "aspect_ratio": "16:9", "num_frames": 9, "guidance": 7.5, "guidance_img": 3.0}
    oscillating = {"text_osci": True, "image_osci": True, "scale_temporal_osci": True, "num_steps": 25}
    return SamplingOption(**{**size, **oscillating, **changes})


@pytest.mark.parametrize("kind", ["t2v", "i2v_head", "distill"])
@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 25])
@pytest.mark.parametrize("name", SHIPPED)
def test_forwards_made_are_forwards_planned(sample, name, num_steps, steady, kind):
    changes = {"text_osci": False, "image_osci": False} if steady else {}
    method = "distill" if kind == "distill" else "i2v"
    cond_type = "t2v" if kind == "distill" else kind
    changes |= {"solver": name, "num_steps": num_steps, "method": method}
    plan = make_plan(option(**changes), LatentSpec((4, 8, 8), is_causal=True), 2, cond_type)
    model = CountingModel()
    denoiser = Denoiser(model, sample["img_ids"], sample["txt_ids"], sample["cond"])
    if method == "distill":
        velocity = distilled_velocity(denoiser, sample["prompt"], plan.guidance.text)
    else:
        velocity = guided_velocity(
            denoiser, sample["prompt"], sample["negative"], plan.guidance, plan.num_steps, FRAMES, plan.has_image
        )
    solve(SOLVERS.get(plan.solver), velocity, sample["img"], plan.steps())
    assert model.rows == plan.forwards * len(sample["img"])


def test_what_solvers_cost():
    steps = make_steps(times_of(10))
    assert {name: len(evaluations(SOLVERS.get(name), steps)) for name in SHIPPED} == {
        "euler": 10,
        "heun": 19,
        "ab2": 10,
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_sample_does_not_depend_on_its_batch(sample, name):
    def take(value):
        if isinstance(value, TextEmbeddings):
            return TextEmbeddings(value.txt[1:], value.vec[1:])
        return value[1:]

    guidance = dataclasses.replace(RELEASED, scale_temporal_osci=True)
    alone = {key: take(value) for key, value in sample.items()}
    together, single = (guided(CountingModel(), each, guidance, times_of(14), True, name) for each in (sample, alone))
    assert together.dtype == torch.float32
    assert together.shape == (2, FRAMES * TOKENS, CHANNELS)
    assert_close(together[1:], single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SHIPPED)
def test_each_step_is_reported_and_may_cancel(name):
    seen = []

    def on_step(step, total, x):
        seen.append((step, total))
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(SOLVERS.get(name), turning, turned(1.0), make_steps(times_of(6)), on_step)
    assert seen == [(1, 6), (2, 6), (3, 6)]


def test_a_solver_of_ones_own(monkeypatch):
    monkeypatch.setattr(SOLVERS, "_added", {})

    @SOLVERS.register("midpoint")
    def midpoint(velocity, x, steps):
        for step in steps:
            change = step.after - step.now
            middle = x + change / 2 * velocity(x, step.now, step.index)
            x = x + change * velocity(middle, step.now + change / 2, step.index)
            yield x

    plan = make_plan(option(solver="midpoint"), LatentSpec((4, 8, 8), is_causal=True), 2)
    assert plan.forwards == 2 * make_plan(option(), LatentSpec((4, 8, 8), is_causal=True), 2).forwards
    errors = [(run("midpoint", turning, turned(1.0), times_of(n)) - turned(0.0)).norm().item() for n in (80, 160)]
    assert observed_order(errors) == [pytest.approx(2, abs=0.2)]


def test_a_solver_that_leaves_out_a_step_is_found():
    with pytest.raises(ValueError, match="shorter"):
        solve(lambda velocity, x, steps: iter([x]), turning, turned(1.0), make_steps(times_of(2)))


def test_unknown_names_are_said_before_anything_is_loaded():
    with pytest.raises(UserError, match="solver eular: expected one of euler, heun"):
        make_plan(option(solver="eular"), LatentSpec((4, 8, 8), is_causal=True), 2)
    with pytest.raises(UserError, match="unknown step cache 'fast'"):
        make_plan(option(step_cache="fast"), LatentSpec((4, 8, 8), is_causal=True), 2)


def test_distilled_models_take_no_references():
    with pytest.raises(UserError, match=r"method distill.*i2v_head"):
        make_plan(option(method="distill"), LatentSpec((4, 8, 8), is_causal=True), 2, "i2v_head")
