"""``opensora benchmark`` without installing: ``python tools/benchmark/inference.py --config CONFIG``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.benchmark import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
