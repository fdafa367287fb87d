"""Draw captioned clips of the demo world: mp4 files and a CSV with every column that training needs.

Clip number i depends on the seed and on i alone, so a larger set begins with the clips of a smaller one.
"""

import argparse
import csv
import io
import json
import sys
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
from tools.demo.world import FPS, NUM_FRAMES, SIZE, SPLITS, Scene, combinations, draw_clip, sample_scene
from tools.outputs import add_overwrite, check_place, is_new, write_new

CRF = 12  # of h264: low enough that compression is not what a model learns
MOST_CLIPS = 10_000_000
RECIPE_VERSION = 2  # of world and captions: raise it when the same seed no longer gives the same clip
COLUMNS = (
    *("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"),
    *("shape", "color", "motion", "background"),
)


def make_scene(index: int, seed: int, split: str) -> tuple[Scene, str]:
    """Scene and caption of clip ``index``: the same whatever the number of clips."""
    rng = np.random.default_rng([seed, index])
    choices = combinations(split)
    scene = sample_scene(rng, choices[int(rng.integers(len(choices)))])
    return scene, random_caption(scene, rng)


def make_clip(index: int, out: Path, seed: int, split: str) -> dict[str, object]:
    """Draw and write clip ``index`` unless it is there; returns its row of the CSV."""
    scene, text = make_scene(index, seed, split)
    path = out / "clips" / f"{index:06d}.mp4"
    if not path.exists():
        save_video(draw_clip(scene), path, fps=FPS, crf=CRF)
    values = (path, text, NUM_FRAMES, SIZE, SIZE, 1.0, SIZE * SIZE, FPS)
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
    out: Path, num: int, seed: int, split: str = "train", workers: int | None = None, overwrite: bool = False
) -> Path:
    """Draw ``num`` clips into ``out``; a run that was cut short is completed.

    Args:
        out: new or empty folder, or one that the same call began.
        num: number of clips, at least 1.
        seed: at least 0.
        split: "train", "held_out" or "all" combinations.
        workers: processes; None takes one per core.
        overwrite: replace a table that was changed.

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
    check_place(out, "--out", folder=True)
    out = out.resolve()
    recipe = {"version": RECIPE_VERSION, "num": num, "seed": seed, "split": split}
    with claimed(out, advice="wait for it or give another --out"):
        prepare_folder(out, recipe)
        return _make_all(out, num, seed, split, workers, overwrite)


def _make_all(out: Path, num: int, seed: int, split: str, workers: int | None, overwrite: bool) -> Path:
    job = partial(make_clip, out=out, seed=seed, split=split)
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
    parser.add_argument("--workers", type=int, default=None, help="processes (None: one per core)")
    add_overwrite(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the clips and print where the table is."""
    args = parse_args(argv)
    table = make_clips(args.out, args.num, args.seed, args.split, args.workers, args.overwrite)
    print(f"{args.num} clips: {table}")


if __name__ == "__main__":
    run_main(main)
