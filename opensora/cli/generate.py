"""Make videos from prompts, pictures and clips.

    opensora generate CONFIG --prompt "a red circle moving right" --save-dir samples
    opensora generate CONFIG --dataset.data-path prompts.csv --nproc N

``--help`` lists every key.
"""

import os
from pathlib import Path

from opensora.acceleration.failures import reported_once
from opensora.acceleration.torchrun import Torchrun
from opensora.config import naming_places, parse_config
from opensora.config.commands import InferenceOptions


def main(argv: list[str] | None = None) -> list[Path]:
    """Run one command line; returns the files this process wrote."""
    with reported_once(os.environ):
        cfg = parse_config(argv, InferenceOptions)
    from opensora.acceleration.devices import pick_device  # after parsing: --help and typos answer at once
    from opensora.acceleration.parallel_context import shutdown
    from opensora.generation.run import generate
    from opensora.utils.logging import setup_logging

    processes = Torchrun.read(os.environ)
    setup_logging(rank=processes.rank)
    with reported_once(os.environ), naming_places(cfg):
        device = pick_device(cfg.device, processes.local_rank)
        made = generate(cfg, device, processes, os.environ)
    shutdown()
    return made
