"""Compute latents and text embeddings beforehand: ``python scripts/diffusion/cache.py CONFIG --cache-dir DIR``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.cache import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
