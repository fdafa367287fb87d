"""Measure how a video model goes on: make videos of the demo world that are longer than its window, and read from their
pixels whether each window shows what was asked for, and whether the object and the picture go through the seams.

Prompts are of motions that go on: standing still, and bouncing. At a seam the object must keep to a straight and even
line, or come back from the border at the same speed, within 1.5 px over half a window on either side, and the picture's
mean luminance and colour must not change by more than they do inside the windows. Keys of the config can be overridden
as in the inference script: --num_steps 20, --overlap 5. A run that was ended resumes where it was.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.windows import Windows
from opensora.utils.errors import UserError
from tools.demo.captions import plain_caption
from tools.demo.measured import Frames, Measurement, add_common, measuring
from tools.demo.options import check_counts, config_parser
from tools.demo.paths import course, track
from tools.demo.scoring import ATTRIBUTES, format_table, judge, share
from tools.demo.world import BACKGROUNDS, BOUNCES, Combination, combinations

LENGTHS = [65, 129]
MOST_STRAY = 1.5  # px, of place and of what is gone in half a window
LUMA = np.array([0.2126, 0.7152, 0.0722])
SHEET_FRAMES = 9
GOES_ON = ("still", *BOUNCES)
SMALLEST_PART = 5  # frames of a last window that can be judged


@dataclass(frozen=True)
class Case:
    """One video to generate."""

    name: str
    combination: Combination
    background: str
    length: int
    seed: int

    @property
    def prompt(self) -> str:
        """The plain wording, with the background."""
        return plain_caption(self.combination, self.background)


def plan_cases(num: int, lengths: Sequence[int], seed: int) -> list[Case]:
    """``num`` prompts of each length: motions that go on in turn, colours and shapes at random, backgrounds alike."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    for length in lengths:
        chosen = [_shuffled(rng, motion) for motion in GOES_ON]
        for i in range(num):
            of_motion = chosen[i % len(chosen)]
            combination = of_motion[i // len(chosen) % len(of_motion)]
            background = list(BACKGROUNDS)[i // len(chosen) % 2]
            cases.append(Case(f"{length}_{i:03d}", combination, background, length, seed + len(cases)))
    return cases


def _shuffled(rng: np.random.Generator, motion: str) -> list[Combination]:
    every = [each for each in combinations("long") if each.motion == motion]
    return [every[i] for i in rng.permutation(len(every))]


def generate(pipe: VideoPipeline, measurement: Measurement, cases: Sequence[Case], batch_size: int) -> None:
    """Make the videos that are not there yet."""

    def make(batch: list[Case]) -> list[Frames]:
        prompts, seeds = [case.prompt for case in batch], [case.seed for case in batch]
        return pipe(prompts, seed=seeds, num_frames=batch[0].length, cond_type="t2v", progress=False).frames

    measurement.make(cases, batch_size, lambda case: case.length, make)


def windows_of(pipe: VideoPipeline, length: int) -> list[range]:
    """Frames of each window of a video of this length; those that two have in common are in both.

    Raises:
        UserError: it is made at once.
    """
    option = pipe.cfg.sampling_option
    windows = Windows.of(replace(option, num_frames=length), pipe.spec)
    if windows is None or option.window is None:
        raise UserError(f"--lengths {length}: this config makes so many frames at once; give more, or --window")
    ratio = pipe.spec.compression[0]
    begins = [index * windows.advance * ratio for index in range(windows.count)]
    return [range(begin, min(begin + option.window, length)) for begin in begins]


def seams_of(windows: Sequence[range]) -> list[int]:
    """The first frame of each window but the first that the one before has not made."""
    return [window.stop for window in windows[:-1]]


def steps_of(frames: Frames) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Change of the mean luminance, and largest change of a mean colour channel, from frame to frame: each [T - 1], of
    255."""
    means = frames.mean((1, 2), dtype=np.float64)  # [T, 3]
    steps = np.diff(means, axis=0)
    return np.abs(steps @ LUMA), np.abs(steps).max(1)


def measure(case: Case, frames: Frames, windows: Sequence[range]) -> Iterator[dict[str, Any]]:
    """A row for each window of a video: the verdict, and what happens at the seam at which it begins."""
    seams = seams_of(windows)
    luma, colour = steps_of(frames)
    inside = np.delete(np.arange(len(luma)), [seam - 1 for seam in seams])
    reach = min(len(windows[0]) // 2, *seams, *(len(frames) - seam for seam in seams))
    found = track(frames)
    for number, window in enumerate(windows):
        if len(window) < SMALLEST_PART:
            continue
        right = judge(frames[window.start : window.stop], case.combination, case.background).right
        row = {"name": case.name, "prompt": case.prompt, "seed": case.seed, "frames": case.length, "window": number}
        row |= {"motion_asked": case.combination.motion, **{name: right[name] for name in (*ATTRIBUTES, "all")}}
        if number:
            seam = seams[number - 1]
            row |= {"luma_step": luma[seam - 1], "colour_step": colour[seam - 1]}
            row |= {"luma_inside": luma[inside].mean(), "luma_inside_most": luma[inside].max()}
            row |= {"colour_inside": colour[inside].mean(), "colour_inside_most": colour[inside].max()}
            row["no_flash"] = luma[seam - 1] <= luma[inside].max() and colour[seam - 1] <= colour[inside].max()
            row |= {"goes_on": False}
            if found is not None:
                way = course(found.part(seam - reach, seam + reach + 1), case.combination.motion == "still")
                row |= {"stray": way.stray, "speed_step": way.speed_step, "turns": way.turns}
                row["goes_on"] = max(way.stray, way.speed_step) <= MOST_STRAY
        yield row


def tabulate(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Shares of windows and seams that are right, over all, by length, by motion and by number of the window."""
    groups = {"all": list(rows)}
    for key, label in (("frames", "{} frames"), ("motion_asked", "{}"), ("window", "window {}")):
        for value in sorted({row[key] for row in rows}):
            name = label.format(value + 1 if key == "window" else value)
            groups[name] = [row for row in rows if row[key] == value]
    return {name: _summary(group) for name, group in groups.items()}


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"windows": len(rows), **{name: share(rows, name) for name in (*ATTRIBUTES, "all")}}
    seams = [row for row in rows if "goes_on" in row]
    if seams:
        found |= {"seams": len(seams), "go on": share(seams, "goes_on"), "no flash": share(seams, "no_flash")}
        for name, column in (("luma", "luma_step"), ("inside", "luma_inside")):
            found[name] = f"{np.mean([row[column] for row in seams]):.2f}"
        for name, column in (("colour", "colour_step"), ("inside ", "colour_inside")):
            found[name] = f"{np.mean([row[column] for row in seams]):.2f}"
    return found


COLUMNS = ("windows", *ATTRIBUTES, "all", "seams", "go on", "no flash", "luma", "inside", "colour", "inside ")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Command line of this tool and the config overrides that are left."""
    parser = config_parser(__doc__)
    add_common(parser)
    parser.add_argument("--num", type=int, default=30, help="prompts of each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="frames of the videos")
    return parser.parse_known_args(argv)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    """Generate, judge, print and write.

    Raises:
        UserError: a value out of range, a folder in use, or anything wrong with the config.
    """
    check_counts(args, num=1, seed=0, eval_batch=1, lengths=2)
    with measuring(args, overrides, num=args.num, lengths=args.lengths) as (pipe, measurement):
        windows = {length: windows_of(pipe, length) for length in args.lengths}
        cases = plan_cases(args.num, args.lengths, args.seed)
        generate(pipe, measurement, cases, args.eval_batch)
        rows: list[dict[str, Any]] = []
        videos = []
        for case in cases:
            frames = measurement.frames(case.name)
            of_case = list(measure(case, frames, windows[case.length]))
            wrong = [str(row["window"] + 1) for row in of_case if not row["all"] or not row.get("goes_on", True)]
            label = f"{case.name} {case.prompt}" + (f" (wrong: {', '.join(wrong)})" if wrong else "")
            videos.append((label, frames, not wrong))
            rows += of_case
        print(format_table(tabulate(rows), COLUMNS))
        print(measurement.write_csv(rows))
        print(measurement.write_sheet(videos, SHEET_FRAMES, 2))


def main(argv: list[str] | None = None) -> None:
    """Measure a model."""
    args, overrides = parse_args(argv)
    evaluate(args, overrides)


if __name__ == "__main__":
    run_main(main)
