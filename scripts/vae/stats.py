"""Latent statistics per channel, to paste into a config: ``python scripts/vae/stats.py CONFIG [--key value ...]``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.vae_stats import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
