"""Turn latents kept by ``inference.py --save-latents True`` into videos, without sampling again.

    python scripts/diffusion/decode.py CONFIG samples/video_256px/prompt_0000.latents.safetensors [--key value ...]

CONFIG and keys are those of ``inference.py``; ``--ae.use_spatial_tiling True`` saves memory.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import parse_config, run_main
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
    return decode_files(cfg, files, pick_device(cfg.device))


if __name__ == "__main__":
    run_main(main)
