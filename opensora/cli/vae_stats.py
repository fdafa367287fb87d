"""Latent statistics per channel, to paste into a config: ``opensora vae-stats CONFIG [--key value ...]``."""

import logging

from opensora.config import naming_places, parse_config
from opensora.config.commands import VaeStatsOptions
from opensora.utils.logging import setup_logging


def main(argv: list[str] | None = None) -> None:
    """Encode the dataset and print what brings its latents to unit variance, in the terms of the autoencoder."""
    cfg = parse_config(argv, VaeStatsOptions)
    setup_logging(level=logging.INFO if cfg.verbose else logging.WARNING)
    from opensora.evaluation.latents import latent_statistics  # after parsing: --help and typos answer at once

    with naming_places(cfg):
        print(latent_statistics(cfg))
