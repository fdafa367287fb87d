"""Loss and gain of step caches on the demo model, by threshold: ``python tools/benchmark/step_caches.py [--quick]``.

The videos of ``tools/demo/evaluate.py``, from text and from pictures, are made without a cache and with each; a row has
the share of videos that show what was asked for, PSNR against the video without a cache, and the share of evaluations
and of blocks that were left out. Then what reuse costs in one double and one single block of the released model's
width, with random weights. Keys of the config can be overridden as in the inference script.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.benchmark.measuring import markdown
from opensora.config import parse_config, run_main
from opensora.config.commands import InferenceOptions
from opensora.diffusion.first_block import FirstBlockCache
from opensora.diffusion.pipeline import VideoPipeline
from opensora.models.diffusion import as_diffusion_model
from opensora.models.mmdit import MMDiTModel
from tools.arguments import Bounded
from tools.benchmark.cases import mmdit_config
from tools.demo.analyse import psnr
from tools.demo.evaluate import Case, Frames, generate, plan_cases, summarise
from tools.demo.options import add_cases

THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
IMAGE, TEXT = 64, 16  # tokens of the two blocks
BLOCK_STEPS = (0.0003, 0.001, 0.003, 0.01)  # of time


@dataclass(frozen=True)
class Row:
    """A cache with a threshold, over all videos.

    Attributes:
        cache, threshold: the run; ``none`` is the exact one.
        text, picture: share of videos from text, and from a picture, that show what was asked for.
        psnr, lowest: dB of the videos against the exact ones, median and lowest.
        reused: share of evaluations that left blocks out.
        blocks: share of all blocks that were left out.
        wait: seconds for a video, text encoders and decoding included.
    """

    cache: str
    threshold: float
    text: float
    picture: float
    psnr: float
    lowest: float
    reused: float
    blocks: float
    wait: float


def left_out(pipe: VideoPipeline, reused: float) -> float:
    """Share of the blocks, where an evaluation that reuses runs the first alone."""
    config = as_diffusion_model(pipe.models["model"]).config
    return reused * (1 - 1 / (config.depth + config.depth_single_blocks))


def frames_of(case: Case) -> Frames:
    """The video of a case that has been made."""
    assert case.frames is not None
    return case.frames


def measure(
    pipe: VideoPipeline, cases: Sequence[Case], exact: Sequence[Case] | None, kind: str | None, threshold: float
) -> Row:
    """Make the videos of all cases, and compare them with the exact ones.

    Args:
        pipe: the demo model.
        cases: filled in by this.
        exact: the same cases, made without a cache; None: these are.
        kind: of the cache, None is no cache.
        threshold: of the cache.
    """
    seconds = generate(pipe, cases, batch_size=8, step_cache=kind, step_cache_threshold=threshold)
    table = summarise(cases)
    decibels = [psnr(frames_of(case), frames_of(other)) for case, other in zip(cases, exact or cases, strict=True)]
    text, picture = (table[name]["all"] if name in table else float("nan") for name in ("both", "i2v"))
    reused = float(np.mean([case.reused for case in cases]))
    middle, lowest = statistics.median(decibels), min(decibels)
    blocks = left_out(pipe, reused)
    row = Row(kind or "none", threshold, text, picture, middle, lowest, reused, blocks, round(seconds, 2))
    print(row, flush=True)
    return row


@dataclass(frozen=True)
class BlockRow:
    """One step with what the second of two blocks added in the step before.

    Attributes:
        step: how far apart the two times are.
        change: of what the first block adds, which a threshold is compared with.
        error: of the velocity, relative to that of both blocks.
    """

    step: float
    change: float
    error: float


@torch.no_grad()
def of_blocks(hidden: int, steps: Sequence[float] = BLOCK_STEPS) -> list[BlockRow]:
    """Reuse over steps of several lengths, by one double and one single block of random weights in float32."""
    torch.manual_seed(0)
    model = MMDiTModel(mmdit_config(hidden, 1, 1, fused=False, cond_embed=False)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    config = model.config
    noise, txt = torch.randn(1, IMAGE, config.in_channels), torch.randn(1, TEXT, config.context_in_dim)
    ids, vec = (torch.zeros(1, count, 3) for count in (IMAGE, TEXT)), torch.randn(1, config.vec_in_dim)
    img_ids, txt_ids = ids

    def velocity(x: Tensor, time: float, cache: FirstBlockCache, number: int) -> Tensor:
        around = partial(cache.around_blocks, branch=("prompt",), step=number)
        found: Tensor = model(x, img_ids, txt, txt_ids, torch.tensor([time]), vec, around=around)
        return found

    rows = []
    for step in steps:
        always, never = FirstBlockCache(3, float("inf")), FirstBlockCache(3, 0.0)
        later = noise - step * velocity(noise, 0.5, always, 0)
        before = always.kept["prompt", 0]
        reused, exact = (velocity(later, 0.5 - step, cache, 1) for cache in (always, never))
        change = (never.kept["prompt", 0].change - before.change).abs().sum() / before.size
        rows.append(BlockRow(step, float(change), float((reused - exact).norm() / exact.norm())))
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffusion/inference/demo.py", help="inference config")
    add_cases(parser)
    parser.add_argument("--caches", nargs="+", default=["first_block"], help="kinds to measure")
    parser.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        action=Bounded,
        least=0,
        most=1000,
        default=THRESHOLDS,
        help="thresholds of each",
    )
    parser.add_argument(
        "--hidden",
        type=int,
        action=Bounded,
        least=0,
        most=2**17,
        default=3072,
        help="width of the two blocks; 0 measures none",
    )
    parser.add_argument("--quick", action="store_true", help="few videos, narrow blocks: to see that it works")
    args, rest = parser.parse_known_args(argv)
    pipe = VideoPipeline.from_config(parse_config([args.config, *rest], InferenceOptions))
    torch.set_num_threads(1)

    def cases() -> list[Case]:
        found = plan_cases(args.num_seen, args.i2v, args.seed)
        return [found[0], found[-1]] if args.quick else found

    exact = cases()
    rows = [measure(pipe, exact, None, None, 0.0)]
    rows += [measure(pipe, cases(), exact, kind, limit) for kind in args.caches for limit in args.thresholds]
    pictures = sum(case.picture is not None for case in exact)
    print(f"\n{len(exact)} videos, {pictures} of them from a picture\n")
    print(markdown([dataclasses.asdict(row) for row in rows]))
    if args.hidden:
        hidden = 256 if args.quick else args.hidden
        print(f"\none double and one single block of width {hidden}, random weights\n")
        print(markdown([dataclasses.asdict(row) for row in of_blocks(hidden)]))


if __name__ == "__main__":
    run_main(main)
