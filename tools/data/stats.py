"""What the numbers look like: ``python tools/data/stats.py OUTPUT [--out DIR]``.

Writes a picture of the funnel, one of the histograms and a table of the distributions.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from tools.arguments import user_path
from tools.data.engine.funnel import FunnelStep, read_funnel
from tools.data.engine.pipeline import read_result
from tools.data.report import Report, add_report

NUMBERS = (
    "num_frames",
    "height",
    "width",
    "fps",
    "score_vmafmotion",
    "flow",
    "pan",
    "tilt",
    "zoom",
    "jitter",
    "sharpness",
    "text_area",
    "aesthetic",
    "match",
    "caption_words",
)
WORDS = ("camera_motion", "tier", "reason")
BINS = 40
KEPT, DROPPED = "#2a6f97", "#c9d6df"


def with_words(table: pl.DataFrame) -> pl.DataFrame:
    """The clips of a run, with the number of words of their captions."""
    if "text" in table.columns:
        table = table.with_columns(pl.col("text").str.split(" ").list.len().alias("caption_words"))
    return table


def summary(table: pl.DataFrame) -> pl.DataFrame:
    """Count, mean, extremes and percentiles of every number there is."""
    rows: list[dict[str, Any]] = []
    for name in NUMBERS:
        if name not in table.columns:
            continue
        values = table[name].drop_nulls()
        if values.is_empty():
            continue
        points = {f"p{p}": values.quantile(p / 100) for p in (5, 25, 50, 75, 95)}
        rows.append(
            {
                "column": name,
                "count": len(values),
                "mean": values.mean(),
                "min": values.min(),
                **points,
                "max": values.max(),
            }
        )
    numbers = ("mean", "min", "p5", "p25", "p50", "p75", "p95", "max")
    schema = {"column": pl.String, "count": pl.Int64, **dict.fromkeys(numbers, pl.Float64)}
    return pl.DataFrame([{k: float(v) if k in numbers else v for k, v in row.items()} for row in rows], schema=schema)


def draw_funnel(steps: Sequence[FunnelStep], path: Path) -> None:
    """One bar per stage: rows that passed, failed, and dropped by reason."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 * len(steps) + 1.2), layout="constrained")
    axes = figure.subplots()
    most = max((step.rows_out + sum(step.dropped.values()) + step.failed for step in steps), default=1)
    for place, step in enumerate(steps):
        left = step.rows_out
        axes.barh(place, left, color=KEPT)
        axes.text(left / 2, place, str(left), ha="center", va="center", color="white" if left > most / 20 else "black")
        notes = []
        for name, count, colour in [
            *((r, n, DROPPED) for r, n in step.dropped.items()),
            ("failed", step.failed, "#d1495b"),
        ]:
            if count:
                axes.barh(place, count, left=left, color=colour, edgecolor="white")
                notes.append(f"{name}: {count}")
                left += count
        axes.text(left + most * 0.01, place, ", ".join(notes), va="center", fontsize=8)
    axes.set_yticks(range(len(steps)), [step.stage for step in steps])
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.6)
    axes.set_xlabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_histograms(table: pl.DataFrame, path: Path) -> None:
    """One panel per column: clips that are in over all clips."""
    from matplotlib.figure import Figure

    names = [name for name in (*NUMBERS, *WORDS) if name in table.columns and table[name].drop_nulls().len()]
    columns = 4
    rows = max(-(-len(names) // columns), 1)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    kept = table.filter(pl.col("keep"))
    for axes, name in zip(panels, names):
        if name in WORDS:
            counts = table.filter(pl.col(name) != "")[name].value_counts(sort=True).head(12)
            axes.barh(counts[name].to_list(), counts["count"].to_list(), color=KEPT)
            axes.invert_yaxis()
            axes.tick_params(axis="y", labelsize=7)
        else:
            values = table[name].drop_nulls().to_numpy()
            limits = float(values.min()), float(values.max())
            limits = limits if limits[0] < limits[1] else (limits[0] - 0.5, limits[1] + 0.5)
            axes.hist(values, BINS, range=limits, color=DROPPED, label="all")
            axes.hist(kept[name].drop_nulls().to_numpy(), BINS, range=limits, color=KEPT, label="kept")
        axes.set_title(name, fontsize=9)
    for axes in panels[len(names) :]:
        axes.axis("off")
    if len(panels) and names:
        panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=user_path, help="folder of a run of tools/data/run.py")
    add_report(parser)
    args = parser.parse_args(argv)
    report = Report(args.output, args.out, args.overwrite)
    table, steps = read_result(args.output), read_funnel(args.output)
    report.write("funnel.png", partial(draw_funnel, steps))
    if "clip_id" in table.columns:
        table = with_words(table.filter(pl.col("clip_id").is_not_null()))
        report.write("histograms.png", partial(draw_histograms, table))
        numbers = summary(table)
        report.write("summary.csv", numbers.write_csv)
        print_numbers(numbers, table)
    print(f"pictures and table: {report.folder}")


def print_numbers(numbers: pl.DataFrame, table: pl.DataFrame) -> None:
    """The summary as text, and how much footage it is."""
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=160,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        float_precision=3,
    ):
        print(numbers)
    kept = table.filter(pl.col("keep") & pl.col("fps").is_not_null())
    seconds = kept.select(pl.col("num_frames") / pl.col("fps")).sum().item()
    print(f"{table.height} clips, {table['keep'].sum()} kept, {(seconds or 0) / 3600:.2f} h kept")


if __name__ == "__main__":
    run_main(main)
