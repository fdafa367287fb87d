"""Make the pictures of the README and docs from what the demo model generates: ``make pictures``.

Contact sheets (PNG) and moving pictures (animated WebP) of videos that the commands beside them in the text make too,
and a film of the page while it makes a video (needs playwright and Chromium).
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
from tools.demo.moving import grid, save_animation
from tools.demo.record_page import film
from tools.outputs import add_overwrite, check_place, write_new

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "diffusion" / "inference" / "demo.py"
PICTURE = ROOT / "assets" / "demo" / "blue_square.png"
FRAMES, SCALE = 5, 2
MOVING_SIDE = 12  # enlargement of all videos in a row together
MILLISECONDS, LAST = 125, 800  # the demo has 8 frames a second; the last one stays a while
PAGE = "page"
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
    """The same prompt and noise in all of the model's steps, and in the four and two of its students."""
    prompts = ["a red circle moving right on a dark background"]
    pipes = {pipe.cfg.sampling_option.num_steps: pipe}
    pipes |= {n: VideoPipeline.from_config(CONFIG.with_name(f"demo_{n}step.py")) for n in (4, 2)}
    made = {n: each(prompts, seed=42).frames for n, each in pipes.items()}
    return [(f"{n} steps: {prompt}", made[n][i]) for i, prompt in enumerate(prompts) for n in pipes]


def picture_first(twin: str, _: VideoPipeline) -> list[Labelled]:
    """Videos by a config that draws a picture first: three prompts."""
    prompts = [
        "a yellow triangle moving left on a dark background",
        "a green square moving up on a light background",
        "a red circle moving right on a dark background",
    ]
    return list(zip(prompts, VideoPipeline.from_config(CONFIG.with_name("demo") / twin)(prompts, seed=42).frames))


SHEETS: dict[str, Callable[[VideoPipeline], list[Labelled]]] = {
    "text_to_video": text_to_video,
    "image_to_video": image_to_video,
    "text_to_image_to_video": partial(picture_first, "t2i2v_256px.py"),
    "high_compression": partial(picture_first, "high_compression.py"),
    "distilled": distilled,
}


def demo(pipe: VideoPipeline) -> list[Labelled]:
    """What ``make demo`` generates, and three other prompts."""
    prompts = [
        "a red circle moving right on a dark background",
        "a blue square moving up on a light background",
        "a green triangle moving left on a light background",
        "a yellow square moving left on a dark background",
    ]
    return [(prompt.split(" on a ")[0], frames) for prompt, frames in zip(prompts, pipe(prompts, seed=42).frames)]


def first_frame(pipe: VideoPipeline) -> list[Labelled]:
    """A picture, and the videos that start from it under two prompts."""
    videos = image_to_video(pipe)
    still = np.broadcast_to(read_image(PICTURE), videos[0][1].shape)
    return [("the picture", still), *((label.removeprefix("a blue square "), video) for label, video in videos)]


def longer(pipe: VideoPipeline) -> list[Labelled]:
    """Videos of several windows."""
    prompts = [
        "a red circle bouncing left and right on a dark background",
        "a cyan triangle bouncing up and down on a light background",
        "a yellow square bouncing left and right on a dark background",
    ]
    videos = pipe(prompts, num_frames=65, seed=42).frames
    return [(prompt.split(" on a ")[0], frames) for prompt, frames in zip(prompts, videos)]


MOVING: dict[str, Callable[[VideoPipeline], list[Labelled]]] = {
    "demo": demo,
    "first_frame": first_frame,
    "longer": longer,
}


def draw_moving(videos: list[Labelled], path: Path) -> None:
    """Write labelled videos side by side, as an animated WebP."""
    labels, frames = zip(*videos)
    pictures = grid(frames, labels, len(videos), MOVING_SIDE // len(videos))
    save_animation(pictures, path, [MILLISECONDS] * (len(pictures) - 1) + [LAST], quality=80)


def draw_page(path: Path) -> None:
    """Write the film of the page."""
    pictures, durations = zip(*film(CONFIG))
    save_animation(pictures, path, durations, quality=60)


def main(argv: list[str] | None = None) -> None:
    """Make all pictures, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SHEETS, *MOVING, PAGE], help="make this one alone")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="default: docs/images")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    check_place(args.out, "--out", folder=True)
    setup_logging()
    names = [args.only] if args.only else [*SHEETS, *MOVING, PAGE]
    if PAGE in names:
        print(write_new(args.out / f"{PAGE}.webp", draw_page, args.overwrite))
    if names == [PAGE]:
        return
    pipe = VideoPipeline.from_config(CONFIG)
    for name in (name for name in names if name in SHEETS):
        labels, videos = zip(*SHEETS[name](pipe))
        draw = partial(contact_sheet, videos, frames=FRAMES, labels=labels, scale=SCALE)
        print(write_new(args.out / f"{name}.png", draw, args.overwrite))
    for name in (name for name in names if name in MOVING):
        print(write_new(args.out / f"{name}.webp", partial(draw_moving, MOVING[name](pipe)), args.overwrite))


if __name__ == "__main__":
    run_main(main)
