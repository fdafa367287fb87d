"""Turn latents kept by ``inference.py --save-latents True`` into videos, without sampling again.

    python scripts/diffusion/decode.py CONFIG samples/video_256px/prompt_0000.latents.safetensors [--key value ...]

CONFIG and keys are those of ``inference.py``; ``--ae.use_spatial_tiling True`` saves memory.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.cli.decode import main
from opensora.config import run_main

if __name__ == "__main__":
    run_main(main)
