"""Split a parquet table into shards for ``memory_efficient`` datasets: ``python scripts/cnv/shard.py FILE [K]``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.shard import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
