"""Compute latents and text embeddings beforehand: ``opensora cache CONFIG --cache-dir DIR``."""

from opensora.config import naming_places, parse_config
from opensora.config.commands import CacheOptions


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the cache."""
    cfg = parse_config(argv, CacheOptions)
    from opensora.training.diffusion.cache import cache_writer  # after parsing: --help and typos answer at once
    from opensora.utils.logging import setup_logging

    setup_logging()
    with naming_places(cfg):
        print(cache_writer(cfg).run())
