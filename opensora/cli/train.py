"""Train the diffusion model: ``opensora train CONFIG [--key value ...]``; on several devices with ``--nproc N``."""

from opensora.config.commands import TrainOptions
from opensora.training.command import train


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    train(argv, TrainOptions, "opensora.training.diffusion.trainer:Trainer")
