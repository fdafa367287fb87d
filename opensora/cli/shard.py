"""Split a parquet table into shards, for datasets with dataset.memory_efficient.

opensora shard clips_meta.parquet 50
"""

import argparse
from pathlib import Path

from opensora.datasets.rows import ROWS_PER_SHARD, shard_folder, write_shards
from opensora.utils.claims import claimed
from opensora.utils.terminal import HelpFormatter


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    tables = parser.add_argument_group("tables")
    tables.add_argument("file", type=Path, help="parquet table")
    tables.add_argument("shards", nargs="?", type=int, help=f"number of files; default: one per {ROWS_PER_SHARD} rows")
    tables.add_argument("--overwrite", action="store_true", help="replace existing shards")
    run = parser.add_argument_group("run")
    run.add_argument("--wait", action="store_true", help="wait for another process that writes there")
    args = parser.parse_args(argv)
    with claimed(shard_folder(args.file), is_folder=False, wait=args.wait, advice="--wait waits for it"):
        folder = write_shards(args.file, args.shards, args.overwrite)
    print(f"{folder}: {len(list(folder.glob('[0-9]*.parquet')))} shards")
