"""Split a parquet table into shards for ``memory_efficient`` datasets: ``python scripts/cnv/shard.py FILE [K]``."""

import argparse
from pathlib import Path

from opensora.datasets.rows import ROWS_PER_SHARD, shard_folder, write_shards
from opensora.utils.claims import claimed


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="parquet table")
    parser.add_argument("shards", nargs="?", type=int, help=f"files; default one per {ROWS_PER_SHARD} rows")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    parser.add_argument("--wait", action="store_true", help="wait for another process that writes there")
    args = parser.parse_args(argv)
    with claimed(shard_folder(args.file), is_folder=False, wait=args.wait, advice="--wait waits for it"):
        folder = write_shards(args.file, args.shards, args.overwrite)
    print(f"{folder}: {len(list(folder.glob('[0-9]*.parquet')))} shards")
