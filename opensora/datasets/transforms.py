"""Frames to model input: resize, crop, normalise."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.utils.errors import UserError

FLOATS_AT_ONCE = 2**24  # numbers of frames that are not scaled yet

Transform = Callable[[Tensor, int, int, bool | None], Tensor]


def to_model_range(frames: np.ndarray) -> Tensor:
    """uint8 ``[T, H, W, 3]`` to float32 ``[3, T, H, W]`` in [-1, 1]."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)
    return video.float() / 127.5 - 1.0


def in_model_range(video: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], to the bit those of :func:`to_model_range` on any device; others as they are.

    A GPU would multiply by the inverse of a number that it is to divide by; by a tensor it divides.
    """
    if video.dtype != torch.uint8:
        return video
    return video.float().div_(torch.full((), 127.5, device=video.device)).sub_(1.0)


def as_bytes(video: Tensor) -> Tensor:
    """uint8 pixels that :func:`in_model_range` makes exactly ``video`` of, if there are such; else ``video``.

    There are for frames of which nothing was scaled. Scaling is done on floats, as in the original, and its result has
    values between those of bytes: these travel as they are.

    Args:
        video: floats [3, T, H, W]; the first frame is looked at first, which settles it for most clips.
    """
    if video.dtype != torch.float32:
        return video
    for part in (video[:, :1], video):
        found = part.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        if not torch.equal(in_model_range(found), part):
            return video
    return found


def fit_frames(
    frames: np.ndarray, height: int, width: int, picture: bool | None = None, transform: Transform | None = None
) -> Tensor:
    """uint8 ``[T, H, W, 3]`` to float32 ``[3, T, height, width]`` in [-1, 1].

    A few frames are fitted at a time, so that no more of a clip is there as floats at its own size; frames are scaled
    each for itself, and the result is the same to the bit.

    Args:
        frames: pixels.
        height, width: their new size.
        picture: as of :func:`resize_crop`.
        transform: one of :data:`TRANSFORMS`; None is :func:`resize_crop`.
    """
    transform, count = transform or resize_crop, len(frames)
    picture = count == 1 if picture is None else picture
    some = max(FLOATS_AT_ONCE // max(frames[0].size, 1), 1) if count else 1
    if count <= some:
        return transform(to_model_range(frames), height, width, picture)
    fitted = torch.empty(3, count, height, width)
    for first in range(0, count, some):
        part = slice(first, first + some)
        fitted[:, part] = transform(to_model_range(frames[part]), height, width, picture)
    return fitted


def resize_crop(video: Tensor, height: int, width: int, picture: bool | None = None) -> Tensor:
    """Scale ``[C, T, H, W]`` until it covers ``height x width``, then cut the centre.

    Videos are scaled bilinearly, pictures bicubically with anti-aliasing, the way the released model saw them; where an
    odd number of rows or columns is cut off, that of videos is the larger part below, that of pictures the even one.

    Args:
        picture: whether the frames come from a picture; None takes a single frame for one.
    """
    picture = video.shape[1] == 1 if picture is None else picture
    return _cover(video, height, width, picture, (lambda excess: round(excess / 2)) if picture else _half)


def _half(excess: int) -> int:
    return excess // 2


def _cover(video: Tensor, height: int, width: int, picture: bool, offset: Callable[[int], int]) -> Tensor:
    """Scale and cut; ``offset`` tells how many of the rows or columns in excess are left out before those that stay."""
    _, _, h, w = video.shape
    if (h, w) == (height, width):
        return video
    scale = max(height / h, width / w)
    size = (max(round(h * scale), height), max(round(w * scale), width))
    mode = "bicubic" if picture else "bilinear"
    video = F.interpolate(video.transpose(0, 1), size=size, mode=mode, align_corners=False, antialias=picture)
    top, left = offset(size[0] - height), offset(size[1] - width)
    video = video[:, :, top : top + height, left : left + width].transpose(0, 1)
    return video.clamp(-1.0, 1.0) if picture else video


def center(video: Tensor, height: int, width: int, picture: bool | None = None) -> Tensor:
    """Scale the short side of ``[C, T, H, W]`` and cut the central square.

    Pictures are halved by averaging while they are twice as large as needed, so that little is lost to aliasing
    (Dhariwal and Nichol 2021); then both kinds are scaled as in :func:`resize_crop`. Here it is videos whose offset is
    rounded to the even number, and pictures whose offset is rounded down.

    Args:
        picture: whether the frames come from a picture; None takes a single frame for one.

    Raises:
        UserError: the size is not square.
    """
    if height != width:
        raise UserError(
            f"dataset.transform_name='center' makes squares, the bucket is {height}x{width}: use resize_crop"
        )
    picture = video.shape[1] == 1 if picture is None else picture
    while picture and min(video.shape[2:]) >= 2 * height:
        rows, columns = (_halving(side).to(video) for side in video.shape[2:])
        video = rows @ video @ columns.T
    return _cover(video, height, width, picture, _half if picture else (lambda excess: round(excess / 2)))


def _halving(side: int) -> Tensor:
    """Weights ``[side // 2, side]`` of Pillow's box filter: where an odd side leaves one over, some average is of three
    neighbours instead of two. Its arithmetic is followed, as rounding decides about those in the middle."""
    count = side // 2
    scale = side / count
    middle = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * scale
    number = torch.arange(side)
    place = (number - middle + 0.5) * (1.0 / scale)
    near = (number >= (middle - 0.5 * scale + 0.5).floor()) & (number < (middle + 0.5 * scale + 0.5).floor())
    weights = (near & (place > -0.5) & (place <= 0.5)).float()
    return weights / weights.sum(dim=1, keepdim=True)


# "rand_size_crop" of Open-Sora gives every clip another size, which batches of one bucket cannot hold.
TRANSFORMS: Mapping[str, Transform] = MappingProxyType({"resize_crop": resize_crop, "center": center})
