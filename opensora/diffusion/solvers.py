"""Solvers of the flow's equation ``dx/dt = velocity(x, t)``, from noise at t = 1 to data at t = 0, by name.

A solver knows nothing of models, prompts or guidance: it is a generator over the states after each step, made of a
velocity and the steps to take. A further one is added from outside::

    @SOLVERS.register("midpoint")
    def midpoint(velocity, x, steps):
        for step in steps:
            change = step.after - step.now
            middle = x + change / 2 * velocity(x, step.now, step.index)
            x = x + change * velocity(middle, step.now + change / 2, step.index)
            yield x
"""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.config.choices import SOLVERS as SOLVERS

Velocity = Callable[[Tensor, float, int], Tensor]
"""``velocity(x, t, step) -> dx/dt``: x and the result [B, L, C] float32, t in [0, 1], guided as in that step."""

StepCallback = Callable[[int, int, Tensor], None]
"""``on_step(step, total, x)``: called after each step (1 to total) with the tokens so far; may raise to cancel."""


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        index: 0 to the number of steps - 1; guidance may depend on it.
        now, after: times at its start and end, falling.
        phase: steps of equal phase see one velocity field, which changes smoothly with time and index. Between phases
            it jumps (oscillating guidance), so a solver compares velocities of one phase only.
    """

    index: int
    now: float
    after: float
    phase: Hashable = None


Solver = Callable[[Velocity, Tensor, Sequence[Step]], Iterator[Tensor]]
"""``solver(velocity, x, steps)`` yields the state after each step. How often and where it asks for the velocity must
not depend on the state: forwards are counted beforehand."""


def make_steps(times: Sequence[float], phases: Sequence[Hashable] | None = None) -> list[Step]:
    """Steps between falling times; ``phases``: one per step, all the same without."""
    spans = itertools.pairwise(times)
    return [Step(index, *span, phases[index] if phases else None) for index, span in enumerate(spans)]


def solve(
    solver: Solver, velocity: Velocity, x: Tensor, steps: Sequence[Step], on_step: StepCallback | None = None
) -> Tensor:
    """Follow the flow.

    The state has float32 at least, whatever the dtype of the model, so that small steps are not lost to rounding.

    Args:
        solver: see :data:`SOLVERS`.
        velocity: what it follows.
        x: noise [B, L, C].
        steps: see :func:`make_steps`.
        on_step: progress and cancelling.

    Returns:
        Tokens [B, L, C] at the last time.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    states = solver(velocity, x, steps)
    for step, x in zip(steps, states, strict=True):
        if on_step is not None:
            on_step(step.index + 1, len(steps), x)
    return x


def asked(solver: Solver, steps: Sequence[Step]) -> list[tuple[float, int]]:
    """(time, step) of each evaluation of the velocity, in order: found by solving for a flow that stands still."""
    found: list[tuple[float, int]] = []

    def still(x: Tensor, t: float, step: int) -> Tensor:
        found.append((t, step))
        return torch.zeros_like(x)

    solve(solver, still, torch.zeros(1), steps)
    return found


def evaluations(solver: Solver, steps: Sequence[Step]) -> list[int]:
    """The step of each evaluation of the velocity, in order."""
    return [step for _, step in asked(solver, steps)]


def euler(velocity: Velocity, x: Tensor, steps: Sequence[Step]) -> Iterator[Tensor]:
    """First order, one evaluation per step."""
    for step in steps:
        x = x + (step.after - step.now) * velocity(x, step.now, step.index)
        yield x


def heun(velocity: Velocity, x: Tensor, steps: Sequence[Step]) -> Iterator[Tensor]:
    """Second order, two evaluations per step but one in the last (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    The velocity at the end of a step is guided as in the next step where that belongs to the same phase, else as in
    this one: both halves of a step follow one field.
    """
    for step, following in itertools.zip_longest(steps, steps[1:]):
        change = step.after - step.now
        start = velocity(x, step.now, step.index)
        if following is None:
            x = x + change * start
        else:
            guided = following if following.phase == step.phase else step
            end = velocity(x + change * start, step.after, guided.index)
            x = x + change / 2 * (start + end)
        yield x


def ab2(velocity: Velocity, x: Tensor, steps: Sequence[Step]) -> Iterator[Tensor]:
    """Second order, one evaluation per step: Adams-Bashforth of two steps.

    ``x' = x + h (v + h/2 (v - v_last) / (t - t_last))`` with the last velocity of the same phase: what tAB-DEIS (Zhang
    and Chen 2022, arXiv:2204.13902) comes to for a rectified flow, whose equation has no linear part. The first step of
    a phase is Euler's: one step of first order leaves the whole of second order. (DPM-Solver++(2M), arXiv:2211.01095,
    extrapolates the data in log signal-to-noise ratio, which is infinite at both ends of a rectified flow: there it
    makes Euler steps, and it is not of second order over the whole time.)
    """
    last: dict[Hashable, tuple[Tensor, float]] = {}
    for step in steps:
        change = step.after - step.now
        start = velocity(x, step.now, step.index)
        slope = torch.zeros_like(x)
        if step.phase in last:
            before, then = last[step.phase]
            slope = (start - before) / (step.now - then)
        last[step.phase] = start, step.now
        x = x + change * (start + change / 2 * slope)
        yield x


def renoise(velocity: Velocity, x: Tensor, steps: Sequence[Step]) -> Iterator[Tensor]:
    """Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1): each step predicts the data and
    noises it anew to the next time. For models that were distilled to it (method ``dmd``).

    The noise of a sample is drawn from a stream that its starting noise determines: it depends on the seed alone.
    """
    streams = [torch.Generator("cpu").manual_seed(_number_of(sample)) for sample in x]
    for step in steps:
        data = x - step.now * velocity(x, step.now, step.index)
        noise = torch.stack([torch.randn(data.shape[1:], generator=stream) for stream in streams]).to(data)
        x = (1 - step.after) * data + step.after * noise
        yield x


def _number_of(sample: Tensor) -> int:
    """A number that equal samples share."""
    content = sample.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % 2**63
