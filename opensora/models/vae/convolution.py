"""Convolution in time and space, with a way around a fault of its gradient on processors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` whose gradient is right for fewer frames than its kernel is long, too.

    There the gradient of a bf16 weight on a CPU is whatever the memory held before (torch 2.13 with oneDNN: not a
    number, or 1e33) if the zeros before and after the clip are left to the kernel. So they are put there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T', H', W']``."""
        zeros = int(self.padding[0])
        if not zeros or x.shape[2] >= self.kernel_size[0] or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        padded = F.pad(x, (0, 0, 0, 0, zeros, zeros))
        padding = (0, *(int(p) for p in self.padding[1:]))
        return F.conv3d(padded, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
