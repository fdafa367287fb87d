"""How far a run is, and what became of its rows: ``python tools/data/status.py OUTPUT``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from tools.data.engine.pipeline import FUNNEL_FILE, TABLE_FILE

MOST_ERRORS = 10


def read_funnel(root: Path) -> list[dict[str, Any]]:
    """What each stage did to the rows, in order.

    Raises:
        UserError: no run in this folder.
    """
    path = root / FUNNEL_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {root} the --output of tools/data/run.py?")
    return json.loads(path.read_text("utf-8"))


def funnel_text(steps: list[dict[str, Any]]) -> str:
    """The funnel as lines of text: rows in, rows out, failed, dropped by reason."""
    lines = [f"{'stage':<12}{'in':>9}{'out':>9}{'failed':>9}  dropped"]
    for step in steps:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in step["dropped"].items())
        if not step["finished"]:
            todo = step["rows_in"] - step["done_before"]
            lines.append(
                f"{step['stage']:<12}{step['rows_in']:>9}{'-':>9}{'-':>9}  not finished, {todo} rows to do at its start"
            )
            continue
        lines.append(
            f"{step['stage']:<12}{step['rows_in']:>9}{step['rows_out']:>9}{step['failed']:>9}  {reasons}".rstrip()
        )
    return "\n".join(lines)


def error_text(table: pl.DataFrame) -> str:
    """The first rows that failed, with why."""
    failed = table.filter(pl.col("error").is_not_null())
    lines = [
        f"{row['path']}: {row['error_stage']}: {row['error']}" for row in failed.head(MOST_ERRORS).iter_rows(named=True)
    ]
    more = failed.height - len(lines)
    if more:
        lines.append(f"and {more} more: column error of {TABLE_FILE}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the funnel and the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of a run of tools/data/run.py")
    root = parser.parse_args(argv).output
    steps = read_funnel(root)
    print(funnel_text(steps))
    if (root / TABLE_FILE).is_file() and all(step["finished"] for step in steps):
        errors = error_text(pl.read_parquet(root / TABLE_FILE))
        if errors:
            print(f"\nfailed (do again with --retry-errors):\n{errors}")


if __name__ == "__main__":
    run_main(main)
