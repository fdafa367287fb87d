"""Compute latents and text embeddings beforehand: ``opensora cache CONFIG --cache-dir DIR``.

Under torchrun the processes divide the work; so do jobs that are each given a ``--cache-part``.
"""

import os

from opensora.acceleration.failures import reported_once
from opensora.acceleration.torchrun import Torchrun
from opensora.config import naming_places, parse_config
from opensora.config.commands import CacheOptions


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the cache."""
    with reported_once(os.environ):
        cfg = parse_config(argv, CacheOptions)
    from opensora.training.diffusion.cache import cache_writer  # after parsing: --help and typos answer at once
    from opensora.utils.logging import setup_logging

    processes = Torchrun.read(os.environ)
    setup_logging(rank=processes.rank)
    with reported_once(os.environ), naming_places(cfg):
        folder = cache_writer(cfg, processes).run()
    if processes.rank == 0:
        print(folder)
