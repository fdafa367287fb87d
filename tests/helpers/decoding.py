"""Videos of latents, without a pipeline."""

from typing import Any

import numpy as np

from opensora.diffusion.decode import Gathered, decode_into


def decode_latents(*arguments: Any) -> list[np.ndarray]:
    """uint8 [num_frames, H, W, 3] of each sample; arguments of :func:`decode_into` after the first."""
    gathered = Gathered()
    decode_into(gathered, *arguments)
    return gathered.videos()
