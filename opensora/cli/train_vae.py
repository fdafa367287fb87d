"""Train a video autoencoder: ``opensora train-vae CONFIG [--key value ...]``; on several devices with ``--nproc N``."""

from opensora.config.commands import VaeTrainOptions
from opensora.training.command import train


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    train(argv, VaeTrainOptions, "opensora.training.vae.trainer:VAETrainer")
