"""Shared by the demo's measurements: clips judged against what they should show, tables of shares, marked sheets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensora.utils.video import contact_sheet
from tools.demo.analyse import WHOLE, Analysis, analyse
from tools.demo.world import Combination

ATTRIBUTES = ("color", "background", "motion", "shape", "object")
WRONG = (255, 0, 0)  # RGB of the frame around a clip that is not what it should be
SHEET_FRAMES = 4
# What else a motion may look like: what bounces need not reach the border within a clip.
ALSO_RIGHT = {"left and right": ("left", "right"), "up and down": ("up", "down")}


@dataclass(frozen=True)
class Verdict:
    """A clip's analysis beside what it should show."""

    expected: dict[str, str]
    analysis: Analysis

    @property
    def right(self) -> dict[str, bool]:
        """Whether each attribute is as expected, and ``all``."""
        each = {name: getattr(self.analysis, name) == self.expected[name] for name in ATTRIBUTES}
        each["motion"] |= self.analysis.motion in ALSO_RIGHT.get(self.expected["motion"], ())
        return {**each, "all": all(each.values())}

    @property
    def label(self) -> str:
        """What was expected, and what was found instead where it differs."""
        wrong = [getattr(self.analysis, name) for name in ATTRIBUTES if not self.right[name]]
        words = " ".join(self.expected[name] for name in ("color", "shape", "motion", "background"))
        return words + (f" (found {', '.join(wrong)})" if wrong else "")

    def as_dict(self) -> dict[str, object]:
        """Plain values for a JSON file."""
        return {"expected": self.expected, "found": asdict(self.analysis), "right": self.right}


def judge(frames: NDArray[np.uint8], combination: Combination, background: str) -> Verdict:
    """Analyse a clip [T, H, W, 3], uint8, that should show ``combination`` on ``background``."""
    return Verdict({**combination._asdict(), "background": background, "object": WHOLE}, analyse(frames))


def shares(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Share of clips that are right, 0 to 1, per attribute and in ``all`` of them; empty without clips."""
    rows = [verdict.right for verdict in verdicts]
    return {name: share(rows, name) for name in rows[0]} if rows else {}


def share(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Share of rows, at least one, in which something is true, 0 to 1."""
    return sum(bool(row[name]) for row in rows) / len(rows)


def format_table(rows: Mapping[str, Mapping[str, object]], columns: Sequence[str]) -> str:
    """Plain-text table; floats up to 1 are shown as percentages, other floats with one digit."""
    lines = [["", *columns]]
    lines += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    text = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines]  # fmt: skip
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.1f}"
    return str(value)


def mark(frames: NDArray[np.uint8], is_right: bool) -> NDArray[np.uint8]:
    """A copy of a clip [T, H, W, 3], with a red frame around it unless it is right."""
    marked = frames.copy()
    if not is_right:
        marked[:, [0, 1, -2, -1]] = WRONG
        marked[:, :, [0, 1, -2, -1]] = WRONG
    return marked


def verdict_sheet(
    clips: Sequence[NDArray[np.uint8]], verdicts: Sequence[Verdict], path: Path, columns: int = 4
) -> Path:
    """Contact sheet of clips under what they should show; red frames mark the wrong ones."""
    marked = [mark(clip, verdict.right["all"]) for clip, verdict in zip(clips, verdicts, strict=True)]
    labels = [verdict.label for verdict in verdicts]
    return contact_sheet(marked, path, frames=SHEET_FRAMES, labels=labels, columns=columns, gap=6)
