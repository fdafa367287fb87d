"""Train the diffusion model: ``python scripts/diffusion/train.py CONFIG [--key value ...]`` (``--help``: all keys).

On several devices: ``torchrun --nproc_per_node N --standalone scripts/diffusion/train.py CONFIG --plugin fsdp2``.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.train import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
