"""Reconstruct clips and measure how well: ``python scripts/vae/inference.py CONFIG [--key value ...]``.

Clips come from a table or a folder (``--dataset.data_path``); results go to ``--save_dir``, and a run that was stopped
resumes where it was. ``--help`` lists the keys.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.reconstruct import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
