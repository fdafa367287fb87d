"""Pictures of kept and dropped clips, to look at: ``python tools/data/sheet.py OUTPUT [--rows 6]``.

One sheet per reason, each clip a strip of frames with its scores: the way to see whether a threshold is right.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.video import contact_sheet, is_video, read_image, read_video
from tools.arguments import Bounded, user_path
from tools.data.engine.pipeline import read_result
from tools.data.engine.stage import shrink
from tools.data.report import Report, add_report

SCORES = ("score_vmafmotion", "sharpness", "text_area", "aesthetic", "match", "camera_motion")
SIDE = 200  # px of a frame on the sheet


def clip_pictures(root: Path, row: dict, frames: int) -> np.ndarray:
    """Some frames of a clip, small, uint8 [T, H, W, 3]."""
    path = root / row["clip_path"]
    video = read_video(path)[0] if is_video(path) else read_image(path)[None]
    chosen = np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)
    return np.stack([shrink(video[index], SIDE) for index in chosen])


def label(row: dict) -> str:
    """The scores of a clip in one line."""
    parts = []
    for name in SCORES:
        value = row.get(name)
        if value is not None:
            parts.append(f"{name} {value:.3g}" if isinstance(value, float) else str(value))
    return ", ".join(parts)[:90]


def make_sheets(report: Report, root: Path, rows: int, frames: int, seed: int) -> list[Path]:
    """Write ``kept.png`` and ``dropped-REASON.png``, of clips drawn at random.

    Raises:
        UserError: the run made no clips.
    """
    table = read_result(root)
    if "clip_path" not in table.columns:
        raise UserError(f"{root}: the run made no clips: its stages lack cut (or whole)")
    table = table.filter(pl.col("clip_path").is_not_null() & pl.col("error").is_null())
    if table.is_empty():
        raise UserError(f"{root}: no file became a clip; tools/data/status.py {root} says why")
    groups = {"kept": table.filter(pl.col("keep"))}
    for reason in sorted(table.filter(~pl.col("keep"))["reason"].unique()):
        name = re.sub(r"[^\w.]+", "-", reason.replace("<", "below").replace(">", "above"))
        groups[f"dropped-{name}"] = table.filter(~pl.col("keep") & (pl.col("reason") == reason))
    paths = []
    for name, group in groups.items():
        if group.height:
            chosen = group.sample(min(rows, group.height), seed=seed, shuffle=True).to_dicts()
            pictures = [clip_pictures(root, row, frames) for row in chosen]
            sheet = partial(contact_sheet, pictures, frames=frames, labels=[label(row) for row in chosen])
            paths.append(report.write(f"{name}.png", sheet))
    return paths


def main(argv: list[str] | None = None) -> None:
    """Write the sheets and say where they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=user_path, help="folder of a run of tools/data/run.py")
    add_report(parser)
    parser.add_argument("--rows", type=int, action=Bounded, least=1, most=1000, default=6, help="clips per sheet")
    parser.add_argument("--frames", type=int, action=Bounded, least=1, most=1000, default=4, help="frames per clip")
    parser.add_argument(
        "--seed", type=int, action=Bounded, least=0, most=2**63 - 1, default=0, help="of the random choice"
    )
    args = parser.parse_args(argv)
    report = Report(args.output, args.out, args.overwrite)
    for path in make_sheets(report, args.output, args.rows, args.frames, args.seed):
        print(path)


if __name__ == "__main__":
    run_main(main)
