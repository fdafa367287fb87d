"""Latent statistics per channel, to paste into a config: ``python scripts/vae/stats.py CONFIG [--key value ...]``."""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import parse_config, run_main
from opensora.config.commands import VaeStatsOptions
from opensora.utils.logging import setup_logging


def main(argv: list[str] | None = None) -> None:
    """Encode the dataset and print what brings its latents to unit variance, in the terms of the autoencoder."""
    cfg = parse_config(argv, VaeStatsOptions)
    setup_logging(level=logging.INFO if cfg.verbose else logging.WARNING)
    from opensora.evaluation.latents import latent_statistics  # after parsing: --help and typos answer at once

    print(latent_statistics(cfg))


if __name__ == "__main__":
    run_main(main)
