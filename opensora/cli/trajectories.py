"""Sample a teacher's trajectories for a student of few steps.

    opensora trajectories CONFIG --dataset.data-path clips.csv --save-dir trajectories/mine

It may be stopped and started again, and started several times at once (on several devices or machines that share the
folder): each process takes the next file that nobody has begun.
"""

import os

from opensora.acceleration.torchrun import Torchrun
from opensora.config import naming_places, parse_config
from opensora.config.commands import TrajectoryOptions


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write."""
    cfg = parse_config(argv, TrajectoryOptions)
    from opensora.acceleration.devices import pick_device  # after parsing: --help and typos answer at once
    from opensora.generation.trajectories import write_trajectories
    from opensora.utils.logging import setup_logging

    processes = Torchrun.read(os.environ)
    setup_logging(rank=processes.rank)
    with naming_places(cfg):
        print(write_trajectories(cfg, pick_device(cfg.device, processes.local_rank)))
