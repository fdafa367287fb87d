"""Reconstruct clips and measure how well: ``opensora reconstruct CONFIG [--key value ...]``.

Clips come from a table or a folder (``--dataset.data_path``); results go to ``--save_dir``, and a run that was stopped
resumes where it was. ``--help`` lists the keys.
"""

import logging

from opensora.config import naming_places, parse_config
from opensora.config.commands import VaeInferenceOptions
from opensora.utils.logging import setup_logging

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # of verbose 0, 1 and 2


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and reconstruct."""
    cfg = parse_config(argv, VaeInferenceOptions)
    setup_logging(level=LEVELS[min(max(cfg.verbose, 0), 2)])
    from opensora.evaluation.reconstruction import reconstruct  # after parsing: --help and typos answer at once

    with naming_places(cfg):
        print(reconstruct(cfg))
