"""Convolution along time with half the multiplications: Winograd's minimal filtering F(4, 3) (arXiv:1509.09308).

Four output frames of a convolution with three taps in time take twelve products of a frame and a 2D kernel when written
out. They are also combinations of six products: a tap is a coefficient of a quadratic polynomial in a delay, and
products of polynomials can be computed from their values at the points 0, 1, -1, 2, -2 and infinity. The result is the
same up to rounding, which in float32 is three times that of the plain convolution (1e-5 for values around one).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4  # output frames computed together, from TILE + 2 input frames

# Rows: the six products. Columns: the six input frames, the three taps of the kernel.
FROM_FRAMES = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
FROM_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Rows: the four output frames. Columns: the six products.
FROM_PRODUCTS = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def tile_kernels(weight: Tensor) -> list[Tensor]:
    """The six 2D kernels ``[C', C, k, k]`` of a 3D one with three taps in time, ``[C', C, 3, k, k]``."""
    return [_combine(row, weight.unbind(2)) for row in FROM_TAPS]


def convolve_tile(
    frames: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, stride: tuple[int, int]
) -> Iterator[Tensor]:
    """The four output frames ``[B, C', H', W']`` of six padded input frames ``[B, C, H, W]``; without gradients."""
    products = [
        # The second product takes part in every output frame once, so the bias may come with it.
        F.conv2d(_combine(row, frames), kernel, bias if i == 1 else None, stride)
        for i, (row, kernel) in enumerate(zip(FROM_FRAMES, kernels))
    ]
    for row in FROM_PRODUCTS:
        yield _combine(row, products)


def _combine(factors: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the tensors times their factors."""
    terms = [(factor, tensor) for factor, tensor in zip(factors, tensors) if factor]
    total = torch.mul(terms[0][1], terms[0][0])
    for factor, tensor in terms[1:]:
        total.add_(tensor, alpha=factor)
    return total
