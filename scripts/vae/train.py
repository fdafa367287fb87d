"""Train a video autoencoder: ``python scripts/vae/train.py CONFIG [--key value ...]`` (``--help`` lists the keys).

On several devices: ``torchrun --nproc_per_node N --standalone scripts/vae/train.py CONFIG --plugin ddp``.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.train_vae import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
