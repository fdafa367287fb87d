"""Measure a video autoencoder on clips of the demo world: PSNR, and what is still recognisable after a round trip.

The config may be one for inference with a video model (its ``ae`` section) or one for the autoencoder itself (its
``model`` section). Keys can be overridden as in the scripts: --ae.from_pretrained PATH, or --ckpt-path PATH
for the second kind.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import load_config, parse_config, run_main
from opensora.config.commands import InferenceOptions, VaeInferenceOptions
from opensora.models.autoencoder import Autoencoder
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.progress import Bar
from opensora.utils.video import contact_sheet, read_video, to_uint8
from tools.demo.analyse import psnr
from tools.demo.options import check_counts, config_parser
from tools.demo.scoring import ATTRIBUTES, SHEET_FRAMES, Verdict, format_table, judge, mark, shares
from tools.demo.world import Combination
from tools.outputs import new_folder

Frames = NDArray[np.uint8]
NEEDED = ("path", "color", "shape", "motion", "background")
SHEET_CLIPS = 24


def read_table(path: Path, num: int) -> pd.DataFrame:
    """The first ``num`` rows of a clip table; relative paths are taken from its folder.

    Raises:
        UserError: not there, or not a table that make_clips.py wrote.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--data {path}: cannot be read as CSV ({error})") from error
    missing = [name for name in NEEDED if name not in table.columns]
    if missing:
        raise UserError(f"--data {path} has no column {', '.join(missing)}; make it with tools/demo/make_clips.py")
    if table.empty:
        raise UserError(f"--data {path} has no rows")
    table = table.head(num)
    table["path"] = [str(path.parent / name) for name in table["path"]]
    return table


def load_autoencoder(config: str, overrides: list[str], device: torch.device) -> Any:
    """The autoencoder of a config, with its weights, in eval mode and float32.

    Raises:
        UserError: anything wrong with config or weights, or none of its sections is an autoencoder.
    """
    words = [config, *overrides]
    if _is_video_model(config):
        section = parse_config(words, InferenceOptions).ae
    else:
        section = parse_config(words, VaeInferenceOptions).model
    model = build_module(section, MODELS, device_map=device, torch_dtype=torch.float32).eval().requires_grad_(False)
    if not isinstance(model, Autoencoder):
        raise UserError(f"{config}: {section.type if section else None!r} is no autoencoder")
    return model


def _is_video_model(config: str) -> bool:
    """Whether a config describes a video model, with an autoencoder in its ``ae`` section."""
    try:
        return load_config(config, InferenceOptions).ae is not None
    except UserError:  # also if there is something wrong with it, which reading it as the other kind will tell
        return False


def that_fits(clip: Frames, model: Autoencoder) -> Frames:
    """The first frames of a clip [T, H, W, 3], as many as the autoencoder takes."""
    return clip[: model.nearest_frames(len(clip))[0]]


@torch.no_grad()
def round_trip(model: Any, clips: list[Frames], device: torch.device) -> list[Frames]:
    """Encode (mean of the posterior) and decode uint8 clips [T, H, W, 3] of one size."""
    batch = torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return [to_uint8(video) for video in model.decode(model.encode(batch, sample_posterior=False))]


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Command line of this tool and the config overrides that are left."""
    parser = config_parser(__doc__, "--data CSV --out DIR")
    parser.add_argument("config", help="e.g. configs/diffusion/inference/demo.py or configs/vae/train/demo.py")
    parser.add_argument("--data", type=Path, required=True, help="clips.csv of clips that were not trained on")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder for results.json and sheet.png")
    parser.add_argument("--num", type=int, default=200, help="clips at most")
    parser.add_argument("--eval_batch", "--eval-batch", type=int, default=8, help="clips at a time")
    return parser.parse_known_args(argv)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    """Reconstruct, judge, print and write.

    Raises:
        UserError: a value out of range, a folder in use, or anything wrong with config, weights or clips.
    """
    check_counts(args, num=1, eval_batch=1)
    with new_folder(args.out, "evaluate_vae"):
        _measure(args, overrides)


def _measure(args: argparse.Namespace, overrides: list[str]) -> None:
    table = read_table(args.data, args.num)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_autoencoder(args.config, overrides, device)
    clips = [that_fits(read_video(path)[0], model) for path in table["path"]]
    start = time.perf_counter()
    decoded: list[Frames] = []
    for first in Bar(range(0, len(clips), args.eval_batch), desc="round trips", unit="batch"):
        decoded += round_trip(model, clips[first : first + args.eval_batch], device)
    seconds = (time.perf_counter() - start) / len(clips)
    named = table[["color", "shape", "motion", "background"]].astype(str).to_numpy().tolist()
    expected = [(Combination(*words[:3]), words[3]) for words in named]
    verdicts = {
        "originals": [judge(clip, *what) for clip, what in zip(clips, expected, strict=True)],
        "round trip": [judge(clip, *what) for clip, what in zip(decoded, expected, strict=True)],
    }
    ratios = [psnr(a, b) for a, b in zip(clips, decoded, strict=True)]
    rows: dict[str, dict[str, Any]] = {name: {"clips": len(clips), **shares(v)} for name, v in verdicts.items()}
    rows["round trip"] |= {"PSNR dB": float(np.mean(ratios)), "lowest dB": float(np.min(ratios))}
    rows["round trip"]["seconds_per_clip"] = round(seconds, 3)
    results = {"config": args.config, "overrides": overrides, "summary": rows, "psnr": [round(r, 2) for r in ratios]}
    write_text(json.dumps(results, indent=2) + "\n", args.out / "results.json")
    draw_sheet(clips, decoded, verdicts["round trip"], ratios, args.out / "sheet.png")
    print(format_table(rows, ["clips", *ATTRIBUTES, "all", "PSNR dB", "lowest dB"]))
    print(f"{seconds:.2f} s per clip\n{args.out / 'results.json'}\n{args.out / 'sheet.png'}")


def draw_sheet(
    clips: list[Frames], decoded: list[Frames], verdicts: list[Verdict], ratios: list[float], path: Path
) -> None:
    """Contact sheet with originals over their reconstructions: the wrong ones and the worst first."""
    order = sorted(range(len(clips)), key=lambda i: (verdicts[i].right["all"], ratios[i]))[:SHEET_CLIPS]
    pairs = [np.concatenate([clips[i], mark(decoded[i], verdicts[i].right["all"])], axis=1) for i in order]
    labels = [f"{ratios[i]:.1f} dB, {verdicts[i].label}" for i in order]
    contact_sheet(pairs, path, frames=SHEET_FRAMES, labels=labels, columns=4, gap=6)


def main(argv: list[str] | None = None) -> None:
    """Measure an autoencoder."""
    args, overrides = parse_args(argv)
    evaluate(args, overrides)


if __name__ == "__main__":
    run_main(main)
