"""Frames to model input: resize, crop, normalise."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
