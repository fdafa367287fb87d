"""Turn latents kept by ``opensora generate --save-latents True`` into videos, without sampling again.

    opensora decode CONFIG samples/video_256px/prompt_0000.latents.safetensors [--key value ...]

CONFIG and keys are those of ``generate``; ``--ae.use_spatial_tiling True`` saves memory.
"""

import sys
from pathlib import Path

from opensora.config import naming_places, parse_config
from opensora.config.commands import InferenceOptions
from opensora.generation import LATENTS_ENDING
from opensora.utils.errors import UserError


def main(argv: list[str] | None = None) -> list[Path]:
    """Run one command line; returns the videos."""
    words = list(sys.argv[1:] if argv is None else argv)
    files = [word for word in words if word.endswith(LATENTS_ENDING)]
    cfg = parse_config([word for word in words if word not in files], InferenceOptions)
    if not files:
        raise UserError(f"no latents given: name one or more *{LATENTS_ENDING} files after the config")
    from opensora.acceleration.devices import pick_device  # after parsing: --help and typos answer at once
    from opensora.generation.decode_files import decode_files
    from opensora.utils.logging import setup_logging

    setup_logging()
    with naming_places(cfg):
        return decode_files(cfg, files, pick_device(cfg.device))
