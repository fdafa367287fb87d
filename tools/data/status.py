"""How far a run is, and what became of its rows: ``python tools/data/status.py OUTPUT``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from tools.arguments import user_path
from tools.data.engine.funnel import FunnelStep, read_funnel
from tools.data.engine.pipeline import TABLE_FILE, read_result

MOST_ERRORS = 10


def funnel_text(steps: Sequence[FunnelStep]) -> str:
    """The funnel as lines of text: rows in, rows out, failed, dropped by reason."""
    lines = [f"{'stage':<12}{'in':>9}{'out':>9}{'failed':>9}  dropped"]
    for step in steps:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in step.dropped.items())
        if not step.finished:
            todo = step.rows_in - step.done_before
            lines.append(
                f"{step.stage:<12}{step.rows_in:>9}{'-':>9}{'-':>9}  not finished, {todo} rows to do at its start"
            )
            continue
        lines.append(f"{step.stage:<12}{step.rows_in:>9}{step.rows_out:>9}{step.failed:>9}  {reasons}".rstrip())
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
    parser.add_argument("output", type=user_path, help="folder of a run of tools/data/run.py")
    root = parser.parse_args(argv).output
    steps = read_funnel(root)
    print(funnel_text(steps))
    if (root / TABLE_FILE).is_file() and all(step.finished for step in steps):
        errors = error_text(read_result(root))
        if errors:
            print(f"\nfailed (do again with --retry-errors):\n{errors}")


if __name__ == "__main__":
    run_main(main)
