"""Compute latents and text embeddings beforehand: ``python scripts/diffusion/cache.py CONFIG --cache-dir DIR``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import parse_config, run_main
from opensora.config.commands import CacheOptions


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the cache."""
    cfg = parse_config(argv, CacheOptions)
    from opensora.training.diffusion.cache import cache_writer  # after parsing: --help and typos answer at once
    from opensora.utils.logging import setup_logging

    setup_logging()
    print(cache_writer(cfg).run())


if __name__ == "__main__":
    run_main(main)
