"""Error of every solver against many Euler steps, by forwards: ``python tools/benchmark/solvers.py [--quick]``.

Prompts of the demo world are sampled from the same noise by each solver with several numbers of steps, with the
guidance of the config. The error of a run is the distance of its latents from those of the reference, over the length
of these; PSNR compares the decoded videos. Keys of the config can be overridden as in the inference script.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.benchmark.measuring import markdown
from opensora.config import parse_config, run_main
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.plan import SamplePlan, make_plan
from opensora.diffusion.solvers import SOLVERS
from opensora.diffusion.velocity import TextEmbeddings
from opensora.diffusion.wording import final_text
from tools.arguments import Bounded
from tools.demo.analyse import psnr
from tools.demo.evaluate import plan_cases

STEPS = {"euler": (15, 30, 50), "heun": (6, 8, 10)}
OF_THE_FLOW = tuple(name for name in SOLVERS if name != "renoise")  # which puts noise back after each step
OTHER_STEPS = (10, 15, 20)  # of solvers with one evaluation per step


@dataclass(frozen=True)
class Prompts:
    """What all solvers start from: embedded texts, and a seed each."""

    positive: TextEmbeddings
    negative: TextEmbeddings
    seeds: list[int]


@dataclass(frozen=True)
class Row:
    """A solver with a number of steps, over all prompts.

    Attributes:
        solver, steps, forwards: the run.
        error, median_error: of the latents, relative to the reference; mean and median over the prompts.
        psnr: dB of the videos against those of the reference, median over the prompts.
        seconds: of all prompts, latents only.
    """

    solver: str
    steps: int
    forwards: int
    error: float
    median_error: float
    psnr: float
    seconds: float


def embed(pipe: VideoPipeline, count: int, seed: int = 0) -> Prompts:
    """The first prompts of the demo's evaluation, every held-out combination before trained ones; another ``seed``
    draws other ones, and other noise."""
    cases = plan_cases(count, 0, seed=seed)[:count]
    texts = [final_text(case.prompt, pipe.cfg.fps_save, None) for case in cases]
    embedded = pipe.encode_prompt([*texts, *[""] * count])
    return Prompts(*embedded.split(count), [case.seed + 1000 * seed for case in cases])


def planned(pipe: VideoPipeline, solver: str, num_steps: int) -> SamplePlan:
    """Text to video with the options of the config."""
    option = dataclasses.replace(pipe.cfg.sampling_option, solver=solver, num_steps=num_steps)
    return make_plan(option, pipe.spec, pipe.cfg.patch_size)


def compare(
    pipe: VideoPipeline, prompts: Prompts, runs: Sequence[tuple[str, int]], reference: tuple[str, int]
) -> list[Row]:
    """Sample and compare; ``runs`` and the reference are solvers with numbers of steps."""
    count = len(prompts.seeds)

    def sample(plan: SamplePlan) -> Tensor:
        return pipe.sample(plan, prompts.positive, prompts.negative, [None] * count, prompts.seeds)

    plan = planned(pipe, *reference)
    expected = sample(plan)
    videos = pipe.decode(expected, plan)
    rows = []
    for solver, steps in runs:
        plan, start = planned(pipe, solver, steps), time.perf_counter()
        latents = sample(plan)
        seconds = time.perf_counter() - start
        errors = ((latents - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).tolist()
        decibels = [psnr(*pair) for pair in zip(pipe.decode(latents, plan), videos)]
        middle = statistics.median(errors)
        mean = float(np.mean(errors))
        rows.append(Row(solver, steps, plan.forwards, mean, middle, statistics.median(decibels), seconds))
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffusion/inference/demo.py", help="inference config")
    parser.add_argument("--prompts", type=int, action=Bounded, least=1, most=10**5, default=20, help="prompts")
    parser.add_argument("--quick", action="store_true", help="3 prompts, few steps: to see that it works")
    parser.add_argument("--reference", default="euler", help="solver of the reference; heun is far closer to the limit")
    parser.add_argument(
        "--reference_steps", type=int, action=Bounded, least=1, most=10**5, default=200, help="its steps"
    )
    parser.add_argument(
        "--prompt_seed",
        type=int,
        action=Bounded,
        least=0,
        most=2**40,
        default=0,
        help="another one draws other prompts and noise",
    )
    args, rest = parser.parse_known_args(argv)
    pipe = VideoPipeline.from_config(parse_config([args.config, *rest], InferenceOptions))
    runs = [(solver, steps) for solver in OF_THE_FLOW for steps in STEPS.get(solver, OTHER_STEPS)]
    count, reference = args.prompts, (args.reference, args.reference_steps)
    if args.quick:
        count, reference, runs = 3, ("euler", 40), [(solver, 4) for solver in OF_THE_FLOW]
    torch.set_num_threads(1)
    rows = compare(pipe, embed(pipe, count, args.prompt_seed), runs, reference)
    scale = pipe.cfg.sampling_option.guidance
    print(f"{count} prompts, guidance {scale}, against {reference[1]} steps of {reference[0]}\n")
    print(markdown([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    run_main(main)
