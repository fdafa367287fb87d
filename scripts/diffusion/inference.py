"""Make videos from prompts, pictures and clips.

    python scripts/diffusion/inference.py CONFIG --prompt "a red circle moving right" --save-dir samples
    torchrun --nproc_per_node N --standalone scripts/diffusion/inference.py CONFIG --dataset.data-path prompts.csv

``--help`` lists every key.
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.acceleration.failures import reported_once
from opensora.acceleration.torchrun import Torchrun
from opensora.config import parse_config, run_main
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
    with reported_once(os.environ):
        device = pick_device(cfg.device, processes.local_rank)
        made = generate(cfg, device, processes, os.environ)
    shutdown()
    return made


if __name__ == "__main__":
    run_main(main)
