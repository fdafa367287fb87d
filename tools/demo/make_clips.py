"""Draw captioned clips of the demo world: mp4 files and a CSV with every column that training needs.

Clip number i depends on the seed and on i alone, so a larger set begins with the clips of a smaller one.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import remove_unfinished_files, write_text
from opensora.utils.progress import Bar
from opensora.utils.video import save_video
from tools.demo.captions import random_caption
from tools.demo.world import FPS, NUM_FRAMES, SIZE, Scene, combinations, draw_clip, sample_scene
from tools.outputs import add_overwrite, check_place, is_new, write_new

CRF = 12  # of h264: low enough that compression is not what a model learns
MOST_CLIPS = 10_000_000
LONG_FRAMES = 33  # of every second clip whose motion can go on
SPLITS = ("train", "held_out", "all")
RECIPE_VERSION = 2  # of world and captions: raise it when the same seed no longer gives the same clip
COLUMNS = (
    *("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"),
    *("shape", "color", "motion", "background"),
)


def make_scene(index: int, seed: int, split: str, long_share: float = 0.0) -> tuple[Scene, str, int]:
    """Scene, caption and number of frames of clip ``index``: the same whatever the number of clips."""
    rng = np.random.default_rng([seed, index])
    goes_on = bool(long_share) and np.random.default_rng([seed, index, 1]).random() < long_share
    choices = combinations("long" if goes_on else split)
    scene = sample_scene(rng, choices[int(rng.integers(len(choices)))])
    text = random_caption(scene, rng)
    return scene, text, LONG_FRAMES if goes_on and rng.random() < 0.5 else NUM_FRAMES


def make_clip(index: int, out: Path, seed: int, split: str, long_share: float = 0.0) -> dict[str, object]:
    """Draw and write clip ``index`` unless it is there; returns its row of the CSV."""
    scene, text, num_frames = make_scene(index, seed, split, long_share)
    path = out / "clips" / f"{index:06d}.mp4"
    if not path.exists():
        save_video(draw_clip(scene, num_frames), path, fps=FPS, crf=CRF)
    values = (path, text, num_frames, SIZE, SIZE, 1.0, SIZE * SIZE, FPS)
    return dict(zip(COLUMNS, (*values, scene.shape, scene.color, scene.motion, scene.background), strict=True))


def prepare_folder(out: Path, recipe: dict[str, object]) -> None:
    """Make the folder and note its recipe in it.

    Raises:
        UserError: the folder holds something else; nothing is overwritten.
    """
    note = out / "recipe.json"
    if not is_new(out):
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"--out {out} exists and holds no clips of this tool; give a new or empty folder") from None
        if found != recipe:
            raise UserError(f"--out {out} holds clips of another recipe, {found}; give a new folder for {recipe}")
    write_text(json.dumps(recipe, indent=2) + "\n", note)  # first: it tells what all else is
    (out / "clips").mkdir(parents=True, exist_ok=True)
    remove_unfinished_files(out)


def make_clips(
    out: Path, num: int, seed: int, split: str = "train", workers: int | None = None, overwrite: bool = False,
    long_share: float = 0.0,
) -> Path:  # fmt: skip
    """Draw ``num`` clips into ``out``; a run that was cut short is completed.

    Args:
        out: new or empty folder, or one that the same call began.
        num: number of clips, at least 1.
        seed: at least 0.
        split: "train", "held_out" or "all" combinations.
        workers: processes; None takes one per core.
        overwrite: replace a table that was changed.
        long_share: 0 to 1, of clips that stand still or bounce; every second of them is 33 frames long.

    Returns:
        Path of the CSV, written last.

    Raises:
        UserError: a value out of range, a folder that holds something else, or a table that was changed.
    """
    bounds = (("num", num, 1, MOST_CLIPS), ("seed", seed, 0, 2**63), ("workers", workers, 1, 4096))
    for flag, value, least, most in bounds:
        if value is not None and value < least:
            raise UserError(f"--{flag} is {value}; it must be at least {least}")
        if value is not None and value > most:
            raise UserError(f"--{flag} is {value}; it must be at most {most}")
    if not 0 <= long_share <= 1:
        raise UserError(f"--long-share is {long_share}; it must be from 0 to 1")
    check_place(out, "--out", folder=True)
    out = out.resolve()
    recipe: dict[str, object] = {"version": RECIPE_VERSION, "num": num, "seed": seed, "split": split}
    if long_share:
        recipe["long_share"] = long_share
    with claimed(out, advice="wait for it or give another --out"):
        prepare_folder(out, recipe)
        job = partial(make_clip, out=out, seed=seed, split=split, long_share=long_share)
        return _make_all(out, num, job, workers, overwrite)


def _make_all(
    out: Path, num: int, job: Callable[[int], dict[str, object]], workers: int | None, overwrite: bool
) -> Path:
    with ProcessPoolExecutor(workers) as pool:
        rows = list(Bar(pool.map(job, range(num), chunksize=8), total=num, desc="clips", unit="clip"))
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text = table.getvalue()
    return write_new(out / "clips.csv", lambda path: path.write_text(text, "utf-8"), overwrite)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for clips/*.mp4 and clips.csv")
    parser.add_argument("--num", type=int, required=True, help="number of clips")
    parser.add_argument("--seed", type=int, required=True, help="seed of the whole set")
    parser.add_argument("--split", choices=SPLITS, default="train", help="combinations of colour, shape and motion")
    parser.add_argument(
        "--long-share", type=float, default=0.0, help="share of clips that stand still or bounce, half of 33 frames"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (None: one per core)")
    add_overwrite(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the clips and print where the table is."""
    args = parse_args(argv)
    table = make_clips(args.out, args.num, args.seed, args.split, args.workers, args.overwrite, args.long_share)
    print(f"{args.num} clips: {table}")


if __name__ == "__main__":
    run_main(main)
