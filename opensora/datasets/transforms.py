"""Frames to model input: resize, crop, normalise."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.utils.errors import UserError


def to_model_range(frames: np.ndarray) -> Tensor:
    """uint8 ``[T, H, W, 3]`` to float32 ``[3, T, H, W]`` in [-1, 1]."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)
    return video.float() / 127.5 - 1.0


def resize_crop(video: Tensor, height: int, width: int) -> Tensor:
    """Scale ``[C, T, H, W]`` until it covers ``height x width``, then cut the centre.

    Videos are scaled bilinearly, single frames bicubically with anti-aliasing, the way the released model saw them.
    """
    _, frames, h, w = video.shape
    if (h, w) == (height, width):
        return video
    scale = max(height / h, width / w)
    size = (max(round(h * scale), height), max(round(w * scale), width))
    picture = frames == 1
    mode = "bicubic" if picture else "bilinear"
    video = F.interpolate(video.transpose(0, 1), size=size, mode=mode, align_corners=False, antialias=picture)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    video = video[:, :, top : top + height, left : left + width].transpose(0, 1)
    return video.clamp(-1.0, 1.0) if picture else video


def center(video: Tensor, height: int, width: int) -> Tensor:
    """Scale the short side of ``[C, T, H, W]`` and cut the central square.

    Single frames are halved by averaging while they are twice as large as needed, so that little is lost to aliasing
    (Dhariwal and Nichol 2021); then both kinds are treated as in :func:`resize_crop`.

    Raises:
        UserError: the size is not square.
    """
    if height != width:
        raise UserError(
            f"dataset.transform_name='center' makes squares, the bucket is {height}x{width}: use resize_crop"
        )
    while video.shape[1] == 1 and min(video.shape[2:]) >= 2 * height:
        h, w = video.shape[2] // 2 * 2, video.shape[3] // 2 * 2
        video = F.avg_pool2d(video[:, 0, :h, :w], 2)[:, None]
    return resize_crop(video, height, width)


# "rand_size_crop" of Open-Sora gives every clip another size, which batches of one bucket cannot hold.
TRANSFORMS: Mapping[str, Callable[[Tensor, int, int], Tensor]] = MappingProxyType(
    {"resize_crop": resize_crop, "center": center}
)
