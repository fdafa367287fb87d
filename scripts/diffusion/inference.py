"""Make videos from prompts, pictures and clips.

    python scripts/diffusion/inference.py CONFIG --prompt "a red circle moving right" --save-dir samples
    torchrun --nproc_per_node N --standalone scripts/diffusion/inference.py CONFIG --dataset.data-path prompts.csv

``--help`` lists every key.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.generate import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
