"""Add the length, size and frame rate of every file to a table.

opensora meta --input clips.csv --output clips_meta.csv
"""

import argparse
from pathlib import Path

from opensora.datasets.meta import write_meta
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.logging import setup_logging
from opensora.utils.terminal import HelpFormatter


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the completed table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    tables = parser.add_argument_group("tables")
    tables.add_argument("--input", required=True, type=Path, help="CSV or parquet table with a column path")
    tables.add_argument("--output", required=True, type=Path, help="CSV or parquet table to write")
    tables.add_argument("--overwrite", action="store_true", help="replace an existing output")
    run = parser.add_argument_group("run")
    run.add_argument("--num_workers", "--num-workers", type=int, help="processes; 0: this one, default: one per core")
    run.add_argument("--wait", action="store_true", help="wait for another process that writes there")
    args = parser.parse_args(argv)
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers}: must be 0 or more")
    setup_logging()
    with claimed(args.output, is_folder=False, wait=args.wait, advice="--wait waits for it"):
        good, broken = write_meta(args.input, args.output, args.num_workers, args.overwrite)
    print(f"{args.output}: {good} rows" + (f" ({broken} unreadable files left out)" if broken else ""))
