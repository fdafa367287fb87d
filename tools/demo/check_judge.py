"""How often the demo's judge agrees with an eye: ``python tools/demo/check_judge.py``.

``tests/golden/judge`` has generated clips (grids of them, ``*.mp4``) and, in ``labels.csv``, what each was to show and
whether someone who looked at all its frames, enlarged, found that it does. ``--sheets`` draws them for another eye.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.video import contact_sheet, read_video
from tools.demo.scoring import Verdict, judge
from tools.demo.world import NUM_FRAMES, SIZE, Combination
from tools.outputs import new_folder

LABELLED = Path(__file__).resolve().parents[2] / "tests" / "golden" / "judge"
ENLARGED = 3  # on the sheets; an eye sees no corners of a circle of 25 px
PER_SHEET = 4
SHOWN = ["color", "shape", "motion", "background"]


@dataclass(frozen=True)
class Labelled:
    """A clip that was looked at.

    Attributes:
        number: row of ``labels.csv``.
        frames: [T, H, W, 3], uint8.
        verdict: what the judge says.
        right: what the eye said.
        first: what it had said before it saw larger pictures; mostly the same.
    """

    number: int
    frames: NDArray[np.uint8]
    verdict: Verdict
    right: bool
    first: bool

    @property
    def agreed(self) -> bool:
        """Whether both say the same."""
        return self.verdict.right["all"] == self.right


def read_clips(rows: pd.DataFrame, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
    """Clips of rows of ``labels.csv``, cut from their grids."""
    grids = {name: read_video(LABELLED / name)[0] for name in sorted(set(rows["grid"]))}
    for number in numbers:
        grid = grids[rows["grid"][number]]  # [T, rows * 64, columns * 64, 3]
        y, x = (SIZE * place for place in divmod(int(rows["clip"][number]), grid.shape[2] // SIZE))
        yield np.ascontiguousarray(grid[:, y : y + SIZE, x : x + SIZE])


def labelled_clips(numbers: Iterable[int] | None = None) -> Iterator[Labelled]:
    """Judge clips that were looked at; some of them, or all."""
    rows = pd.read_csv(LABELLED / "labels.csv")
    numbers = list(range(len(rows)) if numbers is None else numbers)
    for number, clip in zip(numbers, read_clips(rows, numbers), strict=True):
        row = rows.iloc[number]
        verdict = judge(clip, Combination(row["color"], row["shape"], row["motion"]), row["background"])
        yield Labelled(number, clip, verdict, bool(row["right"]), bool(row["first"]))


def agreement(found: Iterable[Labelled]) -> pd.DataFrame:
    """Counts by shape and in all: clips, right ones, and those on which only one of eye and judge says right."""
    rows = [
        {
            "shape": clip.verdict.expected["shape"],
            "clips": 1,
            "right by eye": clip.right,
            "right by judge": clip.verdict.right["all"],
            "agreed": clip.agreed,
            "by judge alone": clip.verdict.right["all"] and not clip.right,
            "by eye alone": clip.right and not clip.verdict.right["all"],
        }
        for clip in found
    ]
    sums = pd.DataFrame(rows).groupby("shape").sum()
    return pd.concat([sums, sums.sum().to_frame("all").T])


def draw_sheets(out: Path) -> None:
    """Write every labelled clip, all frames enlarged, without what was said about it."""
    rows = pd.read_csv(LABELLED / "labels.csv")
    labels = [f"{number}: {' '.join(row[SHOWN])}" for number, row in rows.iterrows()]
    clips = list(read_clips(rows, range(len(rows))))
    for first in range(0, len(clips), PER_SHEET):
        part = slice(first, first + PER_SHEET)
        contact_sheet([enlarge(clip) for clip in clips[part]], out / f"{first:03d}.png", NUM_FRAMES, labels[part])


def enlarge(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] at ``ENLARGED`` times their size, smoothly."""
    size = (frames.shape[2] * ENLARGED, frames.shape[1] * ENLARGED)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def main(argv: list[str] | None = None) -> None:
    """Print the agreement by shape, and every clip on which they differ; or draw sheets.

    Raises:
        UserError: ``--sheets`` is in use.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sheets", type=Path, help="new folder for all frames of all clips, enlarged; judges nothing")
    args = parser.parse_args(argv)
    if args.sheets is not None:
        with new_folder(args.sheets, "check_judge", "--sheets"):
            draw_sheets(args.sheets)
        return
    found = list(labelled_clips())
    print(agreement(found).to_string())
    for clip in found:
        if not clip.agreed:
            print(f"clip {clip.number}: right by {'eye' if clip.right else 'judge'} alone: {clip.verdict.label}")
    changed = [clip for clip in found if clip.right != clip.first]
    agreed_first = sum(clip.verdict.right["all"] == clip.first for clip in found)
    print(f"{len(changed)} labels were changed on larger pictures; by the first ones they agree on {agreed_first}")


if __name__ == "__main__":
    run_main(main)
