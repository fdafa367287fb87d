"""Measure a video model on the demo world: generate clips from prompts (and pictures), and read from their pixels
whether they show what was asked for.

Every combination of colour, shape and motion that was held out from training is generated, and a sample of the trained
ones. Where a picture is drawn first (``use_t2i2v``), it is judged too. Larger frames are judged at 64 pixels.

Keys of the config can be overridden as in the inference script: --num_steps 20, --guidance 4.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import parse_config, run_main
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.utils.files import write_text
from opensora.utils.progress import Bar
from opensora.utils.video import save_image
from tools.demo.analyse import psnr
from tools.demo.captions import plain_caption
from tools.demo.options import check_counts, config_parser
from tools.demo.scoring import ATTRIBUTES, Verdict, format_table, judge, shares, verdict_sheet
from tools.demo.world import (
    BACKGROUNDS,
    HELD_OUT,
    NUM_FRAMES,
    SIZE,
    Combination,
    combinations,
    draw_frame,
    sample_scene,
)
from tools.outputs import new_folder

Frames = NDArray[np.uint8]


@dataclass
class Case:
    """One video to generate: its prompt, seed and, for i2v, its first picture [H, W, 3]; then what came of it."""

    group: str
    combination: Combination
    background: str
    seed: int
    picture: Frames | None = None
    frames: Frames | None = None
    verdict: Verdict | None = None
    drawn: Verdict | None = None  # of the picture made first
    reused: float = 0.0  # share of evaluations in which a step cache left blocks out

    @property
    def prompt(self) -> str:
        """The plain wording, with the background."""
        return plain_caption(self.combination, self.background)

    @property
    def first_frame_psnr(self) -> float | None:
        """dB of the first frame against the picture; None without one."""
        if self.picture is None or self.frames is None:
            return None
        return psnr(self.frames[0], self.picture)


def plan_cases(num_seen: int, num_i2v: int, seed: int) -> list[Case]:
    """All held-out combinations, ``num_seen`` trained ones and ``num_i2v`` pictures to animate, backgrounds in turn.

    Seeds count up from ``seed``, one per video. Pictures show trained and held-out combinations alike.
    """
    rng = np.random.default_rng(seed)
    trained = combinations("train")
    order = rng.permutation(len(trained))
    chosen = [("held out", c) for c in HELD_OUT]
    chosen += [("seen", trained[order[i % len(order)]]) for i in range(num_seen)]
    every = combinations("all")
    order = rng.permutation(len(every))
    chosen += [("i2v", every[order[i % len(order)]]) for i in range(num_i2v)]
    cases = []
    for i, (group, combination) in enumerate(chosen):
        case = Case(group, combination, list(BACKGROUNDS)[i % 2], seed + i)
        if group == "i2v":
            case.picture = draw_frame(sample_scene(rng, combination, case.background), 0.0)
        cases.append(case)
    return cases


def generate(pipe: VideoPipeline, cases: Sequence[Case], batch_size: int, **sampling: Any) -> float:
    """Fill in frames and verdicts of all cases, with these keys of ``sampling_option``; returns the seconds it took per
    video."""
    start = time.perf_counter()
    with Bar(total=len(cases), desc="videos", unit="video") as progress:
        for has_picture in (False, True):
            group = [case for case in cases if (case.picture is not None) == has_picture]
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                result = pipe(
                    [case.prompt for case in batch],
                    ref=[case.picture for case in batch] if has_picture else None,
                    cond_type="i2v_head" if has_picture else "t2v",
                    seed=[case.seed for case in batch],
                    **sampling,
                )
                for case, reused in zip(batch, result.reused):
                    case.reused = reused
                for case, frames in zip(batch, result.frames, strict=True):
                    case.frames = frames
                    case.verdict = judge(at_world_size(frames), case.combination, case.background)
                for case, picture in zip(batch, result.images):
                    still = at_world_size(picture[None]).repeat(NUM_FRAMES, axis=0)
                    case.drawn = judge(still, case.combination._replace(motion="still"), case.background)
                progress.update(len(batch))
    return (time.perf_counter() - start) / max(len(cases), 1)


def at_world_size(frames: Frames) -> Frames:
    """Frames [T, H, W, 3] at the size the judge knows, 64x64; larger ones are averaged down to it."""
    if frames.shape[1:3] == (SIZE, SIZE):
        return frames
    return np.stack([np.asarray(Image.fromarray(f).resize((SIZE, SIZE), Image.Resampling.BOX)) for f in frames])


def summarise(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Number of videos and shares of right ones for seen, held-out, both and i2v, and of pictures made first; for i2v
    also the mean PSNR in dB."""
    groups = {
        "seen": [case for case in cases if case.group == "seen"],
        "held out": [case for case in cases if case.group == "held out"],
        "both": [case for case in cases if case.group != "i2v"],
        "i2v": [case for case in cases if case.group == "i2v"],
    }
    table: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        if not group:
            continue
        table[name] = {"videos": len(group), **shares([case.verdict for case in group if case.verdict])}
        ratios = [ratio for case in group if (ratio := case.first_frame_psnr) is not None]
        if ratios:
            table[name] |= {"first frame dB": float(np.mean(ratios)), "lowest dB": float(np.min(ratios))}
    if drawn := [case.drawn for case in cases if case.drawn]:
        table["pictures"] = {"videos": len(drawn), **shares(drawn)}
    return table


def write_results(out: Path, cases: Sequence[Case], header: dict[str, Any]) -> None:
    """Write results.json, sheet.png and the pictures that i2v started from."""
    videos = []
    for i, case in enumerate(cases):
        assert case.frames is not None
        assert case.verdict is not None
        row = {"group": case.group, "prompt": case.prompt, "seed": case.seed, **case.verdict.as_dict()}
        if case.picture is not None:
            path = save_image(case.picture, out / "pictures" / f"{i:03d}.png")
            row |= {"picture": path.name, "first_frame_psnr": case.first_frame_psnr}
        if case.drawn is not None:
            row |= {"drawn": case.drawn.as_dict()}
        videos.append(row)
    write_text(json.dumps({**header, "videos": videos}, indent=2) + "\n", out / "results.json")
    frames = [case.frames for case in cases if case.frames is not None]
    verdict_sheet(frames, [case.verdict for case in cases if case.verdict], out / "sheet.png")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Command line of this tool and the config overrides that are left."""
    parser = config_parser(__doc__)
    parser.add_argument("config", help="inference config, e.g. configs/diffusion/inference/demo.py")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder for results.json and sheet.png")
    parser.add_argument("--num_seen", "--num-seen", type=int, default=60, help="videos of trained combinations")
    parser.add_argument("--i2v", type=int, default=12, help="videos that start from a picture")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first video; the others count up")
    parser.add_argument("--eval_batch", "--eval-batch", type=int, default=8, help="videos generated at a time")
    return parser.parse_known_args(argv)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    """Generate, judge, print and write.

    Raises:
        UserError: a value out of range, a folder in use, or anything wrong with the config.
    """
    check_counts(args, num_seen=0, i2v=0, seed=0, eval_batch=1)
    with new_folder(args.out, "evaluate"):
        _measure(args, overrides)


def _measure(args: argparse.Namespace, overrides: list[str]) -> None:
    pipe = VideoPipeline.from_config(parse_config([args.config, *overrides], InferenceOptions))
    cases = plan_cases(args.num_seen, args.i2v, args.seed)
    seconds = generate(pipe, cases, args.eval_batch)
    summary = summarise(cases)
    header = {
        "config": args.config,
        "overrides": overrides,
        "seed": args.seed,
        "seconds_per_video": round(seconds, 3),
        "summary": summary,
    }
    write_results(args.out, cases, header)
    columns = ["videos", *ATTRIBUTES, "all"] + (["first frame dB", "lowest dB"] if args.i2v else [])
    print(format_table(summary, columns))
    print(f"{seconds:.2f} s per video\n{args.out / 'results.json'}\n{args.out / 'sheet.png'}")


def main(argv: list[str] | None = None) -> None:
    """Measure a model."""
    args, overrides = parse_args(argv)
    evaluate(args, overrides)


if __name__ == "__main__":
    run_main(main)
