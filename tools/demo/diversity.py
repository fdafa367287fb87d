"""Measure how much videos of one prompt differ from seed to seed: a distilled model may make the same one every time.

For each prompt the root mean square distance between the pixels of two videos (0 to 255), the mean of all pairs of
seeds; then the mean of the prompts. Keys of the config can be overridden as in the inference script.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import parse_config, run_main
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import VideoPipeline
from tools.arguments import Bounded
from tools.demo.captions import plain_caption
from tools.demo.world import BACKGROUNDS, combinations


def spread(videos: Sequence[np.ndarray]) -> float:
    """Mean root mean square distance between two of several videos of one size, uint8 [T, H, W, 3]."""
    pixels = [video.astype(np.float64) for video in videos]
    distances = [np.sqrt(np.mean((one - other) ** 2)) for one, other in itertools.combinations(pixels, 2)]
    return float(np.mean(distances))


def chosen_prompts(count: int, seed: int) -> list[str]:
    """Prompts of the demo world, each combination at most once."""
    every = combinations("all")
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return [plain_caption(every[place], list(BACKGROUNDS)[i % 2]) for i, place in enumerate(order)]


def main(argv: list[str] | None = None) -> None:
    """Generate, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s CONFIG [options] [--key value ...]",
    )
    parser.add_argument("config", help="inference config, e.g. configs/diffusion/inference/demo.py")
    parser.add_argument("--prompts", type=int, action=Bounded, least=1, most=10**5, default=12, help="how many prompts")
    parser.add_argument("--seeds", type=int, action=Bounded, least=2, most=10**5, default=6, help="videos of each")
    parser.add_argument(
        "--seed",
        type=int,
        action=Bounded,
        least=0,
        most=2**40,
        default=42,
        help="of the choice of prompts, and first seed of the videos",
    )
    args, overrides = parser.parse_known_args(argv)
    pipe = VideoPipeline.from_config(parse_config([args.config, *overrides], InferenceOptions))
    seeds = [args.seed + i for i in range(args.seeds)]
    prompts = chosen_prompts(args.prompts, args.seed)
    spreads = [spread(pipe([prompt] * len(seeds), seed=seeds).frames) for prompt in prompts]
    print(f"{len(prompts)} prompts, {len(seeds)} seeds each: {np.mean(spreads):.2f}, deviation {np.std(spreads):.2f}")


if __name__ == "__main__":
    run_main(main)
