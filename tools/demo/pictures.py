"""Draw the pictures of the README and docs/inference.md from what the demo model makes: ``make pictures``.

Each is a contact sheet of videos that the commands beside it in the text make too.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.diffusion.pipeline import VideoPipeline
from opensora.utils.logging import setup_logging
from opensora.utils.video import contact_sheet, read_image
from tools.outputs import add_overwrite, check_place, write_new

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "diffusion" / "inference" / "demo.py"
PICTURE = ROOT / "assets" / "demo" / "blue_square.png"
FRAMES, SCALE = 5, 2
Labelled = tuple[str, np.ndarray]


def text_to_video(pipe: VideoPipeline) -> list[Labelled]:
    """Prompts alone."""
    prompts = [
        "a red circle moving right on a dark background",
        "a purple square moving up on a light background",
        "a green triangle moving left on a light background",
    ]
    return list(zip(prompts, pipe(prompts, seed=42).frames))


def image_to_video(pipe: VideoPipeline) -> list[Labelled]:
    """The same picture as the first frame, under two prompts."""
    prompts = ["a blue square moving up", "a blue square moving right"]
    picture = read_image(PICTURE)
    return list(zip(prompts, pipe(prompts, ref=[picture] * len(prompts), cond_type="i2v_head", seed=42).frames))


def distilled(pipe: VideoPipeline) -> list[Labelled]:
    """The same prompt and noise in 30 steps with guidance, and in the four and two of its students."""
    prompts = ["a red circle moving right on a dark background"]
    pipes = {30: pipe} | {n: VideoPipeline.from_config(CONFIG.with_name(f"demo_{n}step.py")) for n in (4, 2)}
    made = {n: each(prompts, seed=42).frames for n, each in pipes.items()}
    return [(f"{n} steps: {prompt}", made[n][i]) for i, prompt in enumerate(prompts) for n in pipes]


SHEETS: dict[str, Callable[[VideoPipeline], list[Labelled]]] = {
    "text_to_video": text_to_video,
    "image_to_video": image_to_video,
    "distilled": distilled,
}


def main(argv: list[str] | None = None) -> None:
    """Make all sheets, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SHEETS), help="make this one alone")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="default: docs/images")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    check_place(args.out, "--out", folder=True)
    setup_logging()
    pipe = VideoPipeline.from_config(CONFIG)
    for name in [args.only] if args.only else SHEETS:
        labels, videos = zip(*SHEETS[name](pipe))
        draw = partial(contact_sheet, videos, frames=FRAMES, labels=labels, scale=SCALE)
        print(write_new(args.out / f"{name}.png", draw, args.overwrite))


if __name__ == "__main__":
    run_main(main)
