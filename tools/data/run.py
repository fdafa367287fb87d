"""Raw footage to a training table: ``python tools/data/run.py CONFIG --input DIR --output DIR [--key value ...]``.

May be stopped at any moment and started again: it resumes where it was. ``--dry-run`` shows what would be done,
``--retry-errors`` does failed rows again, ``--help`` lists all keys.
"""

import sys
from pathlib import Path

import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.logging import setup_logging
from tools.data.chain import make_pipeline, parse, read_input
from tools.data.engine.pipeline import TABLE_FILE, Pipeline
from tools.data.export import TRAIN_FILE, count_uncaptioned, export
from tools.data.status import error_text, funnel_text


def main(argv: list[str] | None = None) -> None:
    """Run the chain, print the funnel, write the training table."""
    setup_logging()
    cfg = parse(argv)
    files = read_input(cfg)
    pipeline = make_pipeline(cfg.stages, cfg)
    pipeline.own.claim(TRAIN_FILE)
    if cfg.dry_run:
        print_plan(pipeline, files)
        return
    table = pipeline.run(files)
    print(funnel_text(pipeline.funnel))
    errors = error_text(table)
    if errors:
        print(f"\nfailed (do again with --retry-errors):\n{errors}")
    if "clip_path" in table.columns:
        out, count = export(pipeline.root, overwrite=cfg.overwrite)
        print(f"\n{count} clips: {out}")
        uncaptioned = count_uncaptioned(table)
        if uncaptioned:
            print(f"{uncaptioned} more have no caption: they are in {TABLE_FILE} alone")


def print_plan(pipeline: Pipeline, files: pl.DataFrame) -> None:
    """What a run would do."""
    print(f"{files.height} files; output: {pipeline.root}")
    print(f"{'stage':<12}{'rows':>9}{'to do':>9}")
    for plan in pipeline.plan(files):
        shown = ["?" if value is None else str(value) for value in (plan.rows, plan.pending)]
        print(f"{plan.stage:<12}{shown[0]:>9}{shown[1]:>9}")
    print("?: depends on what stages before it find")


if __name__ == "__main__":
    run_main(main)
