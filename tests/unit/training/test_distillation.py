"""Distillation on a flow in the plane that is known in closed form: losses, gradients, and what students reach."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from opensora.diffusion.distilled import Distilled, even_positions
from opensora.diffusion.flow import shifted
from opensora.encoded.trajectories import TrajectoryInfo
from opensora.training.methods.dmd import DistributionMatching, DmdOptions, noised
from opensora.training.methods.guidance import GuidanceDistillation, GuidanceDistillationOptions, draw_scales
from opensora.training.methods.teacher import guided
from opensora.training.methods.trajectory import (
    TrajectoryDistillation,
    TrajectoryDistillationOptions,
    draw_segments,
    places_of,
)
from opensora.utils.errors import UserError
from tests.helpers.mixture import (
    DEVIATION,
    MEANS,
    Student,
    batch_of,
    context_of,
    guided_velocity,
    text_weights,
    velocity,
)

GUIDANCE = 1.5
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}


def follow(x, y_vec, times, scale=GUIDANCE):
    """Euler steps of the guided flow through times [B, S]; one state per time."""
    states = [x]
    for now, after in zip(times.T, times.T[1:]):
        states.append(states[-1] + (after - now)[:, None] * guided_velocity(states[-1], now, y_vec, scale))
    return states


def single_turn(method, batch, seed):
    (turn,) = method(batch, torch.Generator().manual_seed(seed))
    return turn


def gradients(module, loss):
    return torch.autograd.grad(loss, [*module.parameters()])


def test_trajectory_loss_on_the_fly():
    student = Student().double()
    options = TrajectoryDistillationOptions(num_steps=4, guidance=GUIDANCE, teacher_steps=3, shares=[2.0, 1, 1, 0])
    method = TrajectoryDistillation(context_of(student, options))
    batch = batch_of(16, 0, torch.float64)
    turn = single_turn(method, batch, 5)

    generator = torch.Generator().manual_seed(5)
    times = torch.tensor(shifted(even_positions(4), 1, 1))
    segment = draw_segments(16, torch.tensor([0.5, 0.75, 1.0, 1.0], dtype=torch.float64), generator)
    assert torch.bincount(segment, minlength=4).tolist() == [8, 4, 4, 0]
    now, after = times[segment].double(), times[segment + 1].double()
    inputs = method.context.encode(batch, generator, times[segment])["inputs"]
    grid = torch.stack([now + (after - now) * k / 3 for k in range(4)], dim=1)
    start, end = inputs["img"][:, 0], follow(inputs["img"][:, 0], batch["y_vec"], grid)[-1]
    target = (end - start) / (after - now)[:, None]
    expected = (student(**inputs)[:, 0] - target).square().mean()
    # the module works with float32 times and adds up in float32: 1e-6
    torch.testing.assert_close(turn.loss.double(), expected, rtol=3e-6, atol=0)
    for one, other in zip(gradients(student, turn.loss), gradients(student, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


def test_trajectory_loss_from_kept_states():
    student = Student().double()
    batch = batch_of(8, 1, torch.float64)
    options = TrajectoryDistillationOptions(num_steps=2)
    method = TrajectoryDistillation(context_of(student, options))
    sampling = {"guidance": GUIDANCE, "guidance_img": 1.0, "shift": True, "flow_shift": 3.0}
    method.info = TrajectoryInfo({}, sampling, [1, 0.75, 0.5, 0.25, 0], [1, 1, 1], "", 8, 8)
    method.places = torch.tensor(places_of(method.positions, method.info))
    states = torch.randn(8, 5, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0)).half()
    batch |= {"states": states, "text_t5": torch.zeros(8, 1, 1).double(), "text_clip": batch["y_vec"]}
    turn = single_turn(method, batch, 3)

    segment = draw_segments(8, method.bounds, torch.Generator().manual_seed(3))
    times = torch.tensor([1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0], dtype=torch.float64)
    losses = []
    for row, place in enumerate(segment.tolist()):
        start, end = (states[row, 2 * (place + k), :, 0, 0, 0].double() for k in (0, 1))
        now, after = times[place], times[place + 1]
        made = student(start[None, None], None, None, None, now[None].float().double(), batch["y_vec"][row : row + 1])
        losses.append((made[0, 0] - (end - start) / (after - now)).square().mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(turn.loss.double(), expected, rtol=3e-6, atol=0)
    for one, other in zip(gradients(student, turn.loss), gradients(student, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)
    assert Distilled.of(method.metadata(), "file") == method.distilled()
    assert method.distilled().positions == (1.0, 0.5, 0.0)
    assert method.distilled().guidance == GUIDANCE


def train(losses, student, steps, lr=4e-3):
    """Minimise ``losses(step)`` with a falling learning rate."""
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = losses(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample_by_euler(student, times, x, y_vec):
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * student(x[:, None], None, None, None, torch.full((len(x),), now), y_vec)[:, 0]
    return x


def trajectories(count, seed, steps=16):
    """Noise, prompts and all states of the guided teacher on its way to data: [count, steps + 1, 2]."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    y_vec = batch_of(count, seed)["y_vec"]
    times = torch.tensor(shifted(even_positions(steps), 1, 1, flow_shift=2.0)).expand(count, steps + 1)
    return noise, y_vec, torch.stack(follow(noise, y_vec, times), dim=1)


def test_a_student_of_two_steps_samples_what_its_teacher_does():
    """Trained on 1000 trajectories of 16 steps and compared with 1000 others, from the same noise. Two steps of the
    teacher itself are three times further away, and the mean and the deviation of each component (0.25 in the teacher's
    samples) are met within 0.1."""
    torch.manual_seed(0)
    student = Student()
    method = TrajectoryDistillation(context_of(student, TrajectoryDistillationOptions(num_steps=2)))
    sampling = {"guidance": GUIDANCE, "guidance_img": 1.0, "shift": True, "flow_shift": 2.0}
    method.info = TrajectoryInfo({}, sampling, [1, 0.5, 0], [1, 1, 1], "", 1000, 64)
    method.places = torch.tensor([0, 1, 2])
    _, y_vec, states = trajectories(1000, 1)
    kept = states[:, ::8, :, None, None, None].half()

    def losses(step):
        rows = torch.randint(1000, (128,), generator=torch.Generator().manual_seed(step))
        batch = {"index": [*range(128)], "size": [(1, 1, 1)], "states": kept[rows], "text_t5": torch.zeros(128, 1, 1)}
        return single_turn(method, {**batch, "text_clip": y_vec[rows]}, step).loss

    train(losses, student, 200)
    noise, y_vec, states = trajectories(1000, 9)
    truth, times = states[:, -1].float(), method.times((1, 1, 1))
    made = sample_by_euler(student, times.tolist(), noise, y_vec)
    undistilled = follow(noise, y_vec, times.expand(1000, 3))[-1].float()

    def distance(x):
        return (x - truth).square().sum(-1).mean().sqrt()

    assert distance(made) < distance(undistilled) / 3
    for component in range(len(MEANS)):
        chosen = y_vec[:, component] == 1
        torch.testing.assert_close(made[chosen].mean(0), truth[chosen].mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close(made[chosen].std(0), truth[chosen].std(0), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [1, 0.5, 0.6, 0]}, "must fall from 1 to 0"),
        ({"positions": [0.9, 0.5, 0]}, "must fall from 1 to 0"),
        ({"num_steps": 2, "shares": [1.0]}, "give one for each of 2 segments"),
        ({"num_steps": 2, "shares": [0.0, 0.0]}, "give one for each of 2 segments"),
    ],
)
def test_what_cannot_be_distilled(options, message):
    cfg = context_of(Student(), None).cfg
    with pytest.raises(UserError, match=message):
        TrajectoryDistillation.check(cfg, TrajectoryDistillationOptions(**options), Student())


def test_states_that_were_not_kept():
    info = TrajectoryInfo({}, {}, [1, 0.75, 0.5, 0.25, 0], [1, 1, 1], "", 8, 8)
    assert places_of(even_positions(2), info) == [0, 2, 4]
    with pytest.raises(UserError, match=r"no state at 0.875, only at 1, 0.75, 0.5, 0.25, 0"):
        places_of(even_positions(8), info)


def test_guidance_loss():
    student = Student(scales=1).double()
    options = GuidanceDistillationOptions(guidance_range=(1.0, 6.0), off_share=0.25)
    method = GuidanceDistillation(context_of(student, options))
    batch = batch_of(32, 0, torch.float64)
    turn = single_turn(method, batch, 5)

    generator = torch.Generator().manual_seed(5)
    inputs = method.context.encode(batch, generator)["inputs"]
    scale = draw_scales(32, (1.0, 6.0), 0.25, generator)
    assert 2 <= (scale == 1).sum() <= 16
    assert scale.min() >= 1
    assert scale.max() <= 6
    wide = scale.double()[:, None]
    target = guided_velocity(inputs["img"][:, 0], inputs["timesteps"], batch["y_vec"], wide)
    expected = (student(**{**inputs, "guidance": wide})[:, 0] - target).square().mean()
    torch.testing.assert_close(turn.loss.double(), expected, rtol=3e-6, atol=0)
    for one, other in zip(gradients(student, turn.loss), gradients(student, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)
    assert Distilled.of(method.metadata(), "file").scales == "input"


class Pictured(torch.nn.Module):
    """A model whose output tells which text and picture it saw."""

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None):
        seen = y_vec.sum(1)[:, None, None] + 10 * cond.mean(-1, keepdim=True)
        return img * seen


def test_guidance_of_text_and_picture():
    """Against ``u2 + g_img (u - u2) + g_txt (c - u)``, sample by sample; the second sample has no picture."""
    img = torch.ones(3, 4, 2)
    cond = torch.tensor([1.0, 0.0, 3.0])[:, None, None].expand(3, 4, 3)
    inputs = {"img": img, "img_ids": img, "txt": torch.ones(3, 1, 1), "txt_ids": img, "timesteps": torch.ones(3)}
    inputs |= {"y_vec": torch.tensor([[2.0], [3.0], [4.0]]), "cond": cond}
    text, image = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([[1.5, 2.0], [9.0, 9.0], [1.0, 3.0]])
    found = guided(Pictured(), inputs, torch.zeros(1, 1, 1), torch.zeros(1, 1), text, image)
    for row in range(3):
        for token in range(4):
            shown, c_text = 10 * cond[row, 0, 0], inputs["y_vec"][row, 0]
            g_img = image[row, token // 2] if row != 1 else 1.0
            expected = 0 + g_img * shown + text[row] * c_text  # u2 = 0, u = shown, c = shown + text
            torch.testing.assert_close(found[row, token], expected.expand(2))


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {"guidance_embed": False}, "set model.guidance_embed=True"),
        ({"guidance_range": (3.0, 2.0)}, {}, r"guidance_range=\(3.0, 2.0\): the first must not be above"),
        ({"scale_temporal_osci": True}, {}, "needs model.guidance_img_embed=True"),
    ],
)
def test_what_guidance_cannot_be_distilled(options, config, message):
    model = Student()
    model.config = SimpleNamespace(**{"guidance_embed": True, **config})
    with pytest.raises(UserError, match=message):
        GuidanceDistillation.check(context_of(model, None).cfg, GuidanceDistillationOptions(**options), model)


def test_dmd_losses():
    """Of two steps, half of the samples each, on the way of the student itself; see arXiv:2405.14867, eq. 1."""
    torch.manual_seed(3)
    student = Student().double()
    options = DmdOptions(num_steps=2, guidance=GUIDANCE, flow_shift=2.0, score_shift=3.0, fake_updates=3, fake_warmup=1)
    context = context_of(student, options)
    method = DistributionMatching(context)
    (role,) = method.roles
    fake, batch = role.engine.model, batch_of(16, 0, torch.float64)
    context.run.states.global_step = 4
    first, second = method(batch, torch.Generator().manual_seed(5))
    assert (first.role, second.role) == ("model", "fake")

    generator = torch.Generator().manual_seed(5)
    inputs = context.encode(batch, generator)["inputs"]
    y_vec = batch["y_vec"]

    def noise():
        return torch.randn(16, 1, 2, generator=generator).double()

    def data(model, state, t):
        t = torch.as_tensor(t, dtype=torch.float64).expand(16)
        return state - t[:, None, None] * model(**{**inputs, "img": state, "timesteps": t})

    def score_times():
        spread = 0.02 + 0.96 * torch.rand(16, generator=generator)
        return (3 * spread / (1 + 2 * spread)).double()

    middle = 2 * 0.5 / (1 + 0.5)
    start = noise()
    state = (1 - middle) * data(student, start, 1.0).detach() + middle * noise()
    made = torch.cat([data(student, state, middle)[:8], data(student, start, 1.0)[8:]])
    eps, t = noise(), score_times()  # in the order in which the method draws
    wide = t[:, None, None]
    seen = ((1 - wide) * made + wide * eps).detach()
    real = seen - wide * guided_velocity(seen[:, 0], t, y_vec, GUIDANCE)[:, None]
    gradient = (data(fake, seen, t) - real) / (made - real).abs().mean((1, 2), keepdim=True)
    expected = torch.autograd.grad(made, [*student.parameters()], gradient.detach() / made.numel(), retain_graph=True)
    for one, other in zip(gradients(student, first.loss), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # the method adds up in float32

    eps, t = noise(), score_times()
    wide = t[:, None, None]
    result = (1 - wide) * made.detach() + wide * eps
    error = fake(**{**inputs, "img": result, "timesteps": t}) - (eps - made.detach())
    torch.testing.assert_close(second.loss.double(), error.square().mean(), rtol=1e-5, atol=0)
    for one, other in zip(gradients(fake, second.loss), gradients(fake, error.square().mean()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_whose_turn_it_is():
    """After a warm-up of the fake score alone, the student's turn comes in every third step."""
    context = context_of(Student(), DmdOptions(num_steps=1, fake_updates=3, fake_warmup=2))
    method, turns = DistributionMatching(context), []
    for step in range(6):
        context.run.states.global_step = step
        turns.append([turn.role for turn in method(batch_of(4, 0), torch.Generator().manual_seed(step))])
    assert turns == [["fake"], ["fake"], ["model", "fake"], ["fake"], ["fake"], ["model", "fake"]]


def test_every_step_is_learned_as_often_as_another():
    context = context_of(Student(), DmdOptions(num_steps=4))
    method = DistributionMatching(context)
    assert method._last_steps(8) == [3, 3, 2, 2, 1, 1, 0, 0]
    alone = []
    for micro_step in range(400):
        context.run.states.micro_step = micro_step
        alone += method._last_steps(1)
    shares = torch.bincount(torch.tensor(alone)) / 400
    assert (shares - 0.25).abs().max() < 0.08  # three and a half deviations


def test_the_teacher_at_scales_of_one_is_a_single_forward():
    """Guidance at 1 is the prompt's own velocity; the teacher is then asked for nothing else."""
    context = context_of(Student(), DmdOptions(num_steps=1))
    teacher, asked = DistributionMatching(context).teacher, []
    teacher.model.register_forward_pre_hook(
        lambda module, args, given: asked.append(len(given["img"])), with_kwargs=True
    )
    inputs = context.encode(batch_of(8, 0), torch.Generator().manual_seed(0))["inputs"]
    one = torch.ones(8)
    torch.testing.assert_close(teacher.at(inputs, 1.0, None), teacher(inputs, one, one), rtol=1e-6, atol=1e-6)
    assert asked == [8, 16]
    torch.testing.assert_close(teacher.at(inputs, 2.0, None), teacher(inputs, 2 * one, one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_told_the_times_that_states_were_mixed_at(dtype):
    """In bf16 the time is rounded, once for both."""
    data, noise = torch.randn(64, 2, 3), torch.randn(64, 2, 3)
    times = torch.rand(64, generator=torch.Generator().manual_seed(0))
    inputs = {"img": torch.empty(0, dtype=dtype), "timesteps": torch.empty(0, dtype=dtype), "txt": "text"}
    state, wide, given = noised(data, noise, times, inputs)
    told = given["timesteps"]
    assert (told.dtype, given["img"].dtype, given["txt"]) == (dtype, dtype, "text")
    assert torch.equal(told, times.to(dtype))
    assert torch.equal(wide.flatten(), told.float())
    exact = told.float()[:, None, None]
    assert torch.equal(state, (1 - exact) * data + exact * noise)
    assert torch.equal(given["img"], state.to(dtype))


def test_a_student_by_dmd_makes_the_known_distribution():
    """One step without guidance, after 100 updates, on 1000 samples: mean and deviation (0.4) of each component within
    0.12. One step of the teacher makes its mean alone (deviations below 0.25)."""
    torch.manual_seed(0)
    student = Student()
    context = context_of(student, DmdOptions(num_steps=1, guidance=1.0, flow_shift=1.0, fake_updates=4))
    method = DistributionMatching(context)
    fake = method.roles[0].engine.model

    def fit(step):
        inputs = context.encode(batch_of(256, step), torch.Generator().manual_seed(step))["inputs"]
        exact = velocity(inputs["img"][:, 0], inputs["timesteps"], text_weights(inputs["y_vec"]))
        return (student(**inputs)[:, 0] - exact.float()).square().mean()

    train(fit, student, 150)
    fake.load_state_dict(student.state_dict())
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9))
    y_vec = batch_of(1000, 9)["y_vec"]
    before = sample_by_euler(student, [1.0, 0.0], noise, y_vec)
    modules, rates = {"model": student, "fake": fake}, {"model": 2e-3, "fake": 4e-3}
    optimizers = {name: torch.optim.Adam(modules[name].parameters(), betas=(0.5, 0.99)) for name in modules}
    for step in range(400):
        context.run.states.global_step = step
        for turn in method(batch_of(128, step), torch.Generator().manual_seed(step)):
            optimizers[turn.role].param_groups[0]["lr"] = rates[turn.role] * (1 - step / 400)
            optimizers[turn.role].zero_grad()
            turn.loss.backward()
            optimizers[turn.role].step()
    made = sample_by_euler(student, [1.0, 0.0], noise, y_vec)
    for component, mean in enumerate(MEANS.float()):
        chosen = y_vec[:, component] == 1
        assert before[chosen].std(0).max() < 0.25
        torch.testing.assert_close(made[chosen].mean(0), mean, rtol=0, atol=0.12)
        torch.testing.assert_close(made[chosen].std(0), torch.full((2,), DEVIATION), rtol=0, atol=0.12)
