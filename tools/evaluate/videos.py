"""Measure the videos of a folder, without any weights: a table and a page of pictures.

    python tools/evaluate/videos.py FOLDER [--out DIR] [--clip ckpts/openai/clip-vit-large-patch14 --aesthetic HEAD.pth]

Motion, jerk and flicker by optical flow, sharpness, blocks and tile seams, colours, frozen and repeated frames; for
samples of inference.py also how well pictures and clips that they start from are continued, and how different the
videos of one prompt are. Weights that are at hand add a CLIP score, an aesthetic score, the Fréchet distance to a
folder of real clips, and the score of any network that was exported to TorchScript.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.datasets.table import fill_table
from opensora.evaluation.quality import psnr, ssim
from opensora.utils.errors import UserError, first_line, shorten
from opensora.utils.progress import Bar
from tools.arguments import Bounded, Converted, user_path
from tools.evaluate.learned import ClipScores, VideoFeatures, frechet_distance, load_script, script_score
from tools.evaluate.measures import diversity, frame_changes, join, measure_clip, seam, thumbnails
from tools.evaluate.page import known_measures, summary, write_html, write_page
from tools.evaluate.references import borders, fitted_picture
from tools.evaluate.samples import Frames, Sample, list_samples
from tools.outputs import add_overwrite, check_new, check_place, write_new


def measure_sample(sample: Sample) -> dict[str, Any]:
    """The row of a sample; with ``error`` where it cannot be read."""
    row: dict[str, Any] = {"name": sample.name, "prompt": sample.prompt, "seed": sample.seed}
    try:
        frames, fps = sample.read()
    except UserError as error:
        return {**row, "error": first_line(error)}
    row |= {"frames": len(frames), "height": frames.shape[1], "width": frames.shape[2], "fps": fps}
    row |= measure_clip(frames, fps) | given_frames(sample, frames)
    return {**row, "seam_at": seam(frames)[1], "thumbs": thumbnails(frames)}


def given_frames(sample: Sample, frames: Frames) -> dict[str, float]:
    """How well what a sample was made from is continued, as far as its record tells."""
    found: dict[str, float] = {}
    picture = fitted_picture(sample, frames.shape[1:3])
    if picture is not None:
        found["start_psnr"] = min(psnr(picture[None], frames[:1]), 99.0)
        found["start_ssim"] = ssim(picture[None], frames[:1])
    places = [place for place in borders(sample, len(frames)) if 0 < place < len(frames)]
    if places:
        changes = frame_changes(frames)
        found["join"] = max(join(changes, place) for place in places)
    return found


def measure_all(samples: Sequence[Sample], workers: int) -> pd.DataFrame:
    """A row per sample, with the diversity of each prompt's videos.

    Raises:
        UserError: none of them can be read.
    """
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            rows = list(Bar(pool.map(measure_sample, samples), total=len(samples), unit="clip"))
    else:
        rows = [measure_sample(sample) for sample in Bar(samples, unit="clip")]
    readable = [row for row in rows if "thumbs" in row]
    if not readable:
        raise UserError(f"none of {len(rows)} files can be read; {rows[0]['name']}: {rows[0]['error']}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in readable:
        groups.setdefault(row["prompt"], []).append(row)
    for group in groups.values():
        for row, value in zip(group, diversity([row.pop("thumbs") for row in group])):
            row["diversity"] = value
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def add_learned(table: pd.DataFrame, samples: Mapping[str, Sample], args: argparse.Namespace) -> dict[str, float]:
    """Columns by the networks whose weights are given; what they say of the whole folder."""
    scripts = {
        name: script_score(load_script(path, args.device, "--script"), args.device) for name, path in args.script
    }
    clip = ClipScores(args.clip, args.device, args.aesthetic) if args.clip else None
    features = VideoFeatures(args.fvd, args.device) if args.fvd else None
    if not (scripts or clip or features):
        return {}
    found: list[np.ndarray] = []
    for index, name in Bar(list(table["name"].items()), unit="clip", desc="networks"):
        if "error" in table and isinstance(table.loc[index, "error"], str):
            continue
        frames, _ = samples[name].read()
        scores = {name: score(frames) for name, score in scripts.items()}
        scores |= clip(frames, samples[name].prompt) if clip else {}
        for column, value in scores.items():
            table.loc[index, column] = value
        if features is not None:
            found.append(features(frames))
    if features is None:
        return {}
    real = [features(sample.read()[0]) for sample in Bar(list_samples(args.reference), unit="clip", desc="reference")]
    return {"frechet_distance": frechet_distance(found, real), "clips": len(found), "reference_clips": len(real)}


def named_script(text: str) -> tuple[str, Path]:
    """``dover=dover.pt``."""
    name, found, path = text.partition("=")
    if not found or not name.isidentifier():
        raise UserError(f"--script {text}: expected NAME=FILE, such as dover=ckpts/dover.pt")
    return name, user_path(path)


def check_args(args: argparse.Namespace) -> None:
    """Raise a UserError for flags that do not go together, before anything is read."""
    if bool(args.fvd) != bool(args.reference):
        raise UserError("--fvd FILE and --reference FOLDER of real clips go together")
    if args.aesthetic and not args.clip:
        raise UserError("--aesthetic is a head for the features of a CLIP model; give --clip too")
    if args.reference:
        list_samples(args.reference)
    check_place(args.out, "--out", folder=True)
    for name in ("videos.csv", "summary.csv", "videos.html"):
        check_new(args.out / name, args.overwrite, "--out")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, help="of videos (or pictures), also in folders below it")
    parser.add_argument(
        "--out", type=user_path, help="folder of videos.csv, summary.csv and videos.html; default: FOLDER"
    )
    parser.add_argument("--workers", type=int, action=Bounded, least=1, most=1024, default=1, help="processes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where networks work")
    parser.add_argument("--clip", type=user_path, help="folder of a CLIP model: adds clip_score")
    parser.add_argument("--aesthetic", type=user_path, help="head for it: adds aesthetic")
    parser.add_argument("--fvd", type=user_path, help="I3D as TorchScript: Fréchet distance to --reference")
    parser.add_argument("--reference", type=user_path, help="folder of real clips for it")
    parser.add_argument(
        "--script", action=Converted, convert=named_script, many=True, default=[], metavar="NAME=FILE",
        help="TorchScript that scores a clip [1, 3, T, H, W] in [-1, 1]; may be repeated",
    )  # fmt: skip
    add_overwrite(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = make_parser().parse_args(argv)
    args.out = args.out or args.folder
    check_args(args)
    samples = {sample.name: sample for sample in list_samples(args.folder)}
    table = measure_all(list(samples.values()), args.workers)
    whole = add_learned(table, samples, args)
    found = summary(table, known_measures(table))
    page = write_page(table, lambda name: samples[name].read()[0], f"{len(table)} videos of {args.folder}")
    write_new(args.out / "videos.csv", partial(fill_table, table), args.overwrite)
    write_new(args.out / "summary.csv", partial(fill_table, found), args.overwrite)
    write_new(args.out / "videos.html", partial(write_html, page), args.overwrite)
    print(found.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    for name, value in whole.items():
        print(f"{name}: {value:.6g}")
    if "error" in table:
        broken = [str(name) for name in table.loc[table["error"].notna(), "name"]]
        print(f"{len(broken)} cannot be read: {shorten(broken)}; videos.csv says why")
    print(args.out / "videos.html")


if __name__ == "__main__":
    run_main(main)
