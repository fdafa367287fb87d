"""Train a video autoencoder: ``python scripts/vae/train.py CONFIG [--key value ...]`` (``--help`` lists the keys)."""

from opensora.config import parse_config, run_main
from opensora.schema import VaeTrainOptions


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    cfg = parse_config(argv, VaeTrainOptions)
    from opensora.training.vae_trainer import VAETrainer  # after parsing: --help and typos answer at once

    folder = VAETrainer(cfg).run()
    print(folder)


if __name__ == "__main__":
    run_main(main)
