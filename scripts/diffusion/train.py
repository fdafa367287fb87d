"""Train the diffusion model: ``python scripts/diffusion/train.py CONFIG [--key value ...]`` (``--help``: all keys).

On several devices: ``torchrun --nproc_per_node N --standalone scripts/diffusion/train.py CONFIG --plugin fsdp2``.
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.acceleration.failures import reported_once
from opensora.acceleration.torchrun import Torchrun
from opensora.config import parse_config, run_main
from opensora.config.commands import TrainOptions
from opensora.utils.logging import setup_logging


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    with reported_once(os.environ):
        cfg = parse_config(argv, TrainOptions)
    # after parsing: --help and typos answer at once
    from opensora.acceleration.parallel_context import shutdown
    from opensora.training.diffusion.trainer import Trainer

    processes = Torchrun.read(os.environ)
    setup_logging(rank=processes.rank)
    with reported_once(os.environ):
        trainer = Trainer(cfg, processes.local_rank, processes.world_size)
        folder = trainer.run()
    if trainer.parallel.rank == 0:
        print(folder)
    shutdown()


if __name__ == "__main__":
    run_main(main)
