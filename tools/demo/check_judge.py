"""How often the demo's judge agrees with an eye: ``python tools/demo/check_judge.py``.

``tests/golden/judge`` has generated clips (``clips.mp4``, a grid of them) and, in ``labels.csv``, what each was to show
and whether someone who looked at all its frames found that it does.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.video import read_video
from tools.demo.scoring import Verdict, judge
from tools.demo.world import SIZE, Combination

LABELLED = Path(__file__).resolve().parents[2] / "tests" / "golden" / "judge"


@dataclass(frozen=True)
class Labelled:
    """A clip that was looked at.

    Attributes:
        number: in the grid, row by row.
        verdict: what the judge says.
        right: what the eye said.
    """

    number: int
    verdict: Verdict
    right: bool

    @property
    def agreed(self) -> bool:
        """Whether both say the same."""
        return self.verdict.right["all"] == self.right


def labelled_clips(numbers: Iterable[int] | None = None) -> Iterator[Labelled]:
    """Judge clips that were looked at; some of them, or all."""
    rows = pd.read_csv(LABELLED / "labels.csv")
    grid = read_video(LABELLED / "clips.mp4")[0]  # [T, rows * 64, columns * 64, 3]
    columns = grid.shape[2] // SIZE
    for number in range(len(rows)) if numbers is None else numbers:
        y, x = (SIZE * place for place in divmod(number, columns))
        clip: NDArray[np.uint8] = np.ascontiguousarray(grid[:, y : y + SIZE, x : x + SIZE])
        row = rows.iloc[number]
        combination = Combination(row["color"], row["shape"], row["motion"])
        yield Labelled(number, judge(clip, combination, row["background"]), bool(row["right"]))


def main(argv: list[str] | None = None) -> None:
    """Print the agreement by shape, and every clip on which they differ."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    found = list(labelled_clips())
    table = pd.DataFrame(
        {
            "shape": [clip.verdict.expected["shape"] for clip in found],
            "clips": 1,
            "right by eye": [clip.right for clip in found],
            "right by judge": [clip.verdict.right["all"] for clip in found],
            "agreed": [clip.agreed for clip in found],
        }
    )
    sums = table.groupby("shape").sum()
    print(pd.concat([sums, sums.sum().to_frame("all").T]).to_string())
    for clip in found:
        if not clip.agreed:
            print(f"clip {clip.number}: right by {'eye' if clip.right else 'judge'} alone: {clip.verdict.label}")


if __name__ == "__main__":
    run_main(main)
