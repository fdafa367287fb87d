"""Add length, size and frame rate of every file to a table: ``python scripts/cnv/meta.py --input A --output B``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.meta import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
