"""Sample a teacher's trajectories for a student of few steps.

python scripts/diffusion/trajectories.py CONFIG --dataset.data-path clips.csv --save-dir trajectories/mine
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.trajectories import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
