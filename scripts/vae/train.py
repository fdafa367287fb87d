"""Train a video autoencoder: ``python scripts/vae/train.py CONFIG [--key value ...]`` (``--help`` lists the keys).

On several devices: ``torchrun --nproc_per_node N --standalone scripts/vae/train.py CONFIG --plugin ddp``.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.config.commands import VaeTrainOptions
from opensora.training.command import train


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    train(argv, VaeTrainOptions, "opensora.training.vae.trainer:VAETrainer")


if __name__ == "__main__":
    run_main(main)
