"""The step ``table`` of ``vbench.py``: scores of one's own evaluations beside published ones."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from opensora.datasets.table import read_table, write_table
from opensora.evaluation.vbench.published import ROWS
from opensora.evaluation.vbench.scores import SCALES, Scale
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from tools.evaluate.vbench_scoring import read_results

FULL = {"t2v": 944, "i2v": 1118}  # different prompts of a whole suite


def table(args: argparse.Namespace) -> None:
    """Write table.csv and table.md, and print the latter.

    Raises:
        UserError: nothing is scored, or the evaluations are of different suites.
    """
    suites = {_settings(work)["suite"] for work in args.works}
    if len(suites) > 1:
        raise UserError(f"{' '.join(map(str, args.works))}: of VBench and of VBench-I2V; make a table of each")
    suite = suites.pop()
    scale = SCALES[suite]
    rows = [own_row(work, scale, FULL[suite]) for work in args.works] + published_rows(suite, scale)
    columns = ["model", "total", *(group.name for group in scale.groups), *scale.dimensions, "source"]
    found = pd.DataFrame(rows, columns=columns)
    folder = args.out or args.works[0]
    write_table(found, folder / "table.csv")
    text = markdown(found)
    write_text(text, folder / "table.md")
    print(text)


def _settings(work: Path) -> dict[str, Any]:
    path = work / "settings.json"
    if not path.is_file():
        raise UserError(f"{work}: no evaluation there; `vbench.py prepare --work {work}` begins one")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def own_row(work: Path, scale: Scale, full: int) -> dict[str, Any]:
    """Scores of an evaluation; its source says what it lacks to be comparable."""
    results = {name: found for name in scale.dimensions if (found := read_results(work, name)) is not None}
    if not results:
        raise UserError(f"{work}: nothing is scored yet; `vbench.py score --work {work}` does it")
    scores = {name: score for name, (score, _) in results.items()}
    rows = read_table(work / "prompts.csv", as_text=True)
    expected = Counter(name for cell in rows["dimensions"] for name in cell.split(";"))
    short = [name for name, (_, videos) in results.items() if len(videos) < expected[name]]
    settings = _settings(work)
    notes = []
    if settings["prompts"] < full:
        notes.append(f"{settings['prompts']} of {full} prompts: not comparable")
    if settings["samples"] < 5:
        notes.append(f"{settings['samples']} of 5 videos per prompt")
    if short:
        notes.append(f"videos missing in {', '.join(short)}")
    if lacking := [name for name in scale.dimensions if name not in scores]:
        notes.append(f"not scored: {', '.join(lacking)}")
    return {"model": work.name, "source": "; ".join(notes) or "this evaluation", **scale.summary(scores), **scores}


def published_rows(suite: str, scale: Scale) -> list[dict[str, Any]]:
    """Published scores, with where they stand."""
    return [{"model": row.model, "source": row.source, **row.summary, **row.scores} for row in ROWS[suite]]


def markdown(rows: pd.DataFrame) -> str:
    """A table with a column per model, since there are more dimensions than models; scores in percent."""
    names = [column for column in rows.columns if column not in ("model", "source")]
    lines: list[Sequence[str]] = [["", *rows["model"]], ["---", *["---:"] * len(rows)]]
    lines += [[name.replace("_", " "), *(_percent(value) for value in rows[name])] for name in names]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_sources(rows.to_dict('records'))}\n"


def _sources(rows: Iterable[Mapping[Any, Any]]) -> str:
    return "\n".join(f"- {row['model']}: {row['source']}" for row in rows)


def _percent(value: float) -> str:
    return "" if pd.isna(value) else f"{100 * value:.2f}"
