"""The sampler beside the plain loop that runs three forwards at every step, on a toy model on the CPU."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.benchmark.measuring import seconds_of
from opensora.diffusion.conditions import build_condition
from opensora.diffusion.flow import get_schedule
from opensora.diffusion.guidance import Guidance, count_forwards, image_scale, oscillate
from opensora.diffusion.latents import get_noise, pack, prepare_ids
from opensora.diffusion.solvers import euler, make_steps, solve
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, guided_velocity
from opensora.models.mmdit import MMDiTConfig, MMDiTModel

STEPS = 50
LATENT, CHANNELS, TEXT_TOKENS, WIDTH = (5, 24, 24), 4, 32, 64
GUIDANCE = Guidance(7.5, 3.0, text_osci=True, image_osci=True, scale_temporal_osci=True)  # of the released configs


@dataclass
class Comparison:
    """Medians of both loops for a condition.

    Attributes:
        condition: ``t2v`` or ``i2v_head``.
        steps: of a run.
        forwards: of a run of the sampler.
        plain_forwards: of a run of the plain loop.
        median_s, plain_median_s: seconds of a run.
        ratio: of the medians.
        difference: largest between the results, over the largest value.
        seconds, plain_seconds: of all runs.
    """

    condition: str
    steps: int
    forwards: int
    plain_forwards: int
    median_s: float
    plain_median_s: float
    ratio: float
    difference: float
    seconds: list[float]
    plain_seconds: list[float]


@dataclass(frozen=True)
class Inputs:
    """What both loops are given."""

    model: MMDiTModel
    noise: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    prompt: TextEmbeddings
    negative: TextEmbeddings
    cond: Tensor
    times: Sequence[float]
    has_image: bool


def toy_inputs(has_image: bool) -> Inputs:
    """A small model with random weights, and one sample."""
    generator = torch.Generator().manual_seed(0)
    config = MMDiTConfig(
        in_channels=4 * CHANNELS,
        vec_in_dim=WIDTH,
        context_in_dim=WIDTH,
        hidden_size=256,
        mlp_ratio=4.0,
        num_heads=8,
        depth=1,
        depth_single_blocks=2,
        axes_dim=[8, 12, 12],
        theta=10_000,
        qkv_bias=True,
        guidance_embed=False,
        cond_embed=True,
    )
    model = MMDiTModel(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.02, generator=generator)
    noise = get_noise([0], CHANNELS, LATENT)
    refs = [[torch.randn(CHANNELS, 1, *LATENT[1:], generator=generator)] if has_image else None]
    cond = build_condition(noise, "i2v_head" if has_image else "t2v", refs, is_causal=True)
    img_ids, txt_ids = prepare_ids(1, LATENT, 2, TEXT_TOKENS)

    def text() -> TextEmbeddings:
        tokens, vector = (torch.randn(1, *shape, WIDTH, generator=generator) for shape in ((TEXT_TOKENS,), ()))
        return TextEmbeddings(tokens, vector)

    times = get_schedule(STEPS, LATENT[1] * LATENT[2] // 4, LATENT[0])
    return Inputs(model, pack(noise), img_ids, txt_ids, text(), text(), pack(cond), times, has_image)


@torch.no_grad()
def plain_loop(inputs: Inputs) -> Tensor:
    """Guidance as its formula reads: prompt, negative and negative without picture in one batch at every step."""
    x, frames = inputs.noise, LATENT[0]
    texts = (inputs.prompt, inputs.negative, inputs.negative)
    txt, vec = torch.cat([each.txt for each in texts]), torch.cat([each.vec for each in texts])
    cond = torch.cat([inputs.cond, inputs.cond, torch.zeros_like(inputs.cond)])
    for step, (now, after) in enumerate(itertools.pairwise(inputs.times)):
        prediction = inputs.model(
            img=x.repeat(3, 1, 1),
            img_ids=inputs.img_ids.repeat(3, 1, 1),
            txt=txt,
            txt_ids=inputs.txt_ids.repeat(3, 1, 1),
            timesteps=torch.full((3,), now),
            y_vec=vec,
            cond=cond,
        )
        both, negative, neither = prediction.chunk(3)
        text = oscillate(GUIDANCE.text, step)
        image = image_scale(GUIDANCE, step, STEPS, frames)
        if isinstance(image, Tensor):
            image = image.repeat_interleave(x.shape[1] // frames)[None, :, None]
        x = x + (after - now) * (neither + image * (negative - neither) + text * (both - negative))
    return x


def sampler(inputs: Inputs) -> Tensor:
    """The same by the sampler of the pipeline."""
    denoiser = Denoiser(inputs.model, inputs.img_ids, inputs.txt_ids, inputs.cond)
    velocity = guided_velocity(
        denoiser, inputs.prompt, inputs.negative, GUIDANCE, STEPS, LATENT[0], has_image=inputs.has_image
    )
    return solve(euler, velocity, inputs.noise, make_steps(inputs.times))


def compare_samplers(repeats: int) -> list[Comparison]:
    """Time both loops for t2v and i2v_head; they take turns, each goes first as often as the other."""
    rows = []
    for condition in ("t2v", "i2v_head"):
        inputs = toy_inputs(condition != "t2v")
        expected, found = plain_loop(inputs), sampler(inputs)  # and to warm up
        times: dict[str, list[float]] = {"sampler": [], "plain": []}
        runs = {"sampler": lambda inputs=inputs: sampler(inputs), "plain": lambda inputs=inputs: plain_loop(inputs)}
        order = list(runs)
        for _ in range(repeats):
            for name in order:
                times[name].append(seconds_of(runs[name], torch.device("cpu")))
            order.reverse()
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            Comparison(
                condition,
                STEPS,
                count_forwards(GUIDANCE, STEPS, inputs.has_image),
                3 * STEPS,
                medians["sampler"],
                medians["plain"],
                medians["sampler"] / medians["plain"],
                ((found - expected).abs().max() / expected.abs().max()).item(),
                times["sampler"],
                times["plain"],
            )
        )
    return rows
