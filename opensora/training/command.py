"""The command behind ``opensora train`` and ``opensora train-vae``."""

import importlib
import os
from collections.abc import Sequence

from opensora.acceleration.failures import reported_once
from opensora.acceleration.torchrun import Torchrun
from opensora.config import naming_places, parse_config
from opensora.config.commands import TrainOptions, VaeTrainOptions
from opensora.utils.logging import get_logger, setup_logging

logger = get_logger(__name__)


def train(argv: Sequence[str] | None, options: type[TrainOptions | VaeTrainOptions], place: str) -> None:
    """Parse a command line, train, and print the experiment's folder.

    Args:
        argv: words after the script's name; None takes those of this process.
        options: the script's option group.
        place: its trainer, as ``module:Class``; imported after parsing, so that ``--help`` and typos answer at once.
    """
    with reported_once(os.environ):
        cfg = parse_config(argv, options)
    from opensora.acceleration.parallel_context import shutdown

    module, _, name = place.partition(":")
    processes = Torchrun.read(os.environ)
    setup_logging(rank=processes.rank)
    with reported_once(os.environ), naming_places(cfg):
        if isinstance(cfg, TrainOptions) and cfg.dry_run:
            from opensora.training.diffusion.outlook import outlook_of, report

            text = report(outlook_of(cfg, processes.world_size))
            if processes.rank == 0:
                print(text)
            return
        from opensora.training.run import RunComplete

        try:
            folder = getattr(importlib.import_module(module), name)(
                cfg, processes.local_rank, processes.world_size
            ).run()
        except RunComplete as complete:
            logger.info("%s", complete)
            folder = complete.folder
    if processes.rank == 0:
        print(folder)
    shutdown()
