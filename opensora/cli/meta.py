"""Add length, size and frame rate of every file to a table: ``python scripts/cnv/meta.py --input A --output B``."""

import argparse
from pathlib import Path

from opensora.datasets.meta import write_meta
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.logging import setup_logging


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the completed table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, type=Path, help="csv or parquet table with a column path")
    parser.add_argument("--output", required=True, type=Path, help="csv or parquet table to write")
    parser.add_argument("--num_workers", "--num-workers", type=int, help="processes (0: this one); default all cores")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--wait", action="store_true", help="wait for another process that writes there")
    args = parser.parse_args(argv)
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers}: must be 0 or more")
    setup_logging()
    with claimed(args.output, is_folder=False, wait=args.wait, advice="--wait waits for it"):
        good, broken = write_meta(args.input, args.output, args.num_workers, args.overwrite)
    print(f"{args.output}: {good} rows" + (f" ({broken} unreadable files left out)" if broken else ""))
