"""Convolution along time with half the multiplications: Winograd's minimal filtering F(4, 3) (arXiv:1509.09308).

Four output frames of a convolution with three taps in time take twelve products of a frame and a 2D kernel when written
out. They are also combinations of six products: a tap is a coefficient of a quadratic polynomial in a delay, and
products of polynomials can be computed from their values at the points 0, 1, -1, 2, -2 and infinity. The result is the
same up to rounding, which in float32 is three times that of the plain convolution (1e-5 for values around one).

The values at x and -x are the even part of a polynomial plus and minus its odd part, so that both parts are computed
once for each pair of points: what surrounds the products is half the operations of the transforms written as matrices.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4  # output frames computed together, from TILE + 2 input frames


def tile_kernels(weight: Tensor) -> list[Tensor]:
    """The six 2D kernels ``[C', C, k, k]`` of a 3D one with three taps in time, ``[C', C, 3, k, k]``."""
    a, b, c = weight.unbind(2)
    ones = (a + c).div_(-6)  # even part of the values at 1 and -1
    twos = (a / 24).add_(c, alpha=1 / 6)  # of those at 2 and -2
    return [
        a / 4,
        torch.sub(ones, b, alpha=1 / 6),
        torch.add(ones, b, alpha=1 / 6),
        torch.add(twos, b, alpha=1 / 12),
        torch.sub(twos, b, alpha=1 / 12),
        c.contiguous(),
    ]


def _tile_frames(frames: Sequence[Tensor]) -> Iterator[Tensor]:
    """The six pictures to be convolved, one after the other, for the points 0, 1, -1, 2, -2 and infinity."""
    a, b, c, d, e, f = frames
    even, odd = e - c, d - b
    yield torch.add(even, a - c, alpha=4)  # 4a - 5c + e
    last = (f - d).sub_(odd, alpha=4)  # 4b - 5d + f
    twos = torch.sub(even, c, alpha=3), torch.sub(odd, b, alpha=3)
    yield twos[0] + twos[1]  # e - 4c + d - 4b
    yield twos[0].sub_(twos[1])  # e - 4c - d + 4b
    del twos
    yield torch.add(even, odd, alpha=2)  # e - c + 2d - 2b
    yield even.sub_(odd, alpha=2)  # e - c - 2d + 2b
    yield last


def convolve_tile(
    frames: Sequence[Tensor],
    kernels: Sequence[Tensor],
    bias: Tensor | None,
    stride: tuple[int, int],
    out: Sequence[Tensor],
) -> None:
    """Write the four output frames ``[B, C', H', W']`` of six padded input frames ``[B, C, H, W]``; no gradients."""
    zero, one, minus_one, two, minus_two, last = (
        # The second product takes part in every output frame once, so the bias may come with it.
        F.conv2d(frame, kernel, bias if i == 1 else None, stride)
        for i, (frame, kernel) in enumerate(zip(_tile_frames(frames), kernels))
    )
    even_twos, odd_twos = two + minus_two, two.sub_(minus_two)
    even_ones, odd_ones = one + minus_one, one.sub_(minus_one)
    torch.add(zero.add_(even_ones), even_twos, out=out[0])
    torch.add(odd_ones, odd_twos, alpha=2, out=out[1])
    torch.add(even_ones, even_twos, alpha=4, out=out[2])
    torch.add(last.add_(odd_ones), odd_twos, alpha=8, out=out[3])
