"""Train the diffusion model: ``python scripts/diffusion/train.py CONFIG [--key value ...]`` (``--help``: all keys)."""

from opensora.config import parse_config, run_main
from opensora.schema import TrainOptions


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    cfg = parse_config(argv, TrainOptions)
    from opensora.training.trainer import Trainer  # after parsing: --help and typos answer at once

    print(Trainer(cfg).run())


if __name__ == "__main__":
    run_main(main)
