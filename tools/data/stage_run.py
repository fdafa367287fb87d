"""One stage alone: ``python tools/data/stage_run.py STAGE CONFIG --input DIR --output DIR [--key value ...]``.

Files are taken as whole clips (unless the stage is scenes or cut), and what the stage needs is made first. The result
is ``OUTPUT/STAGE.csv``: path and the columns that the stage adds.
"""

import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.logging import setup_logging
from tools.data.chain import STAGES, chain_for, make_pipeline, parse, read_input
from tools.data.engine.tables import fill_table
from tools.data.run import print_plan
from tools.data.status import error_text


def main(argv: list[str] | None = None) -> None:
    """Run the stage and write its table."""
    setup_logging()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        raise UserError(f"usage: stage_run.py STAGE CONFIG --input DIR --output DIR; stages: {', '.join(STAGES)}")
    cfg = parse(words[1:])
    files = read_input(cfg)
    chain = chain_for(words[0], cfg, files.columns)
    pipeline = make_pipeline(chain, cfg)
    if cfg.dry_run:
        print_plan(pipeline, files)
        return
    name = f"{words[0]}.csv"
    pipeline.own.claim(name)
    table = pipeline.run(files)
    out = pipeline.own.write(name, partial(fill_table, table.select("path", *STAGES[words[0]].adds, "error")))
    errors = error_text(table)
    if errors:
        print(f"failed (do again with --retry-errors):\n{errors}\n")
    print(f"{table.height} rows: {out}")


if __name__ == "__main__":
    run_main(main)
