"""Building blocks of the deep-compression video autoencoder (DC-AE, arXiv:2410.10733; its layers are EfficientViT's,
arXiv:2205.14756, with a time axis)."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.utils.checkpoint import checkpoint

from opensora.models.dc_ae.config import HEAD_DIM
from opensora.models.hunyuan_vae.blocks import INDEX_LIMIT, upsample_nearest
from opensora.models.vae.convolution import Conv3d

Factor = tuple[int, int, int]


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """``conv(x)`` for zero-padded convolutions, with one frame as an image and very large videos in pieces along time.

    Convolution kernels index with 32 bits, so that no call may see more than 2^31 - 1 elements.
    """
    size, stride, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    space_pad = (int(conv.padding[1]), int(conv.padding[2]))
    if x.shape[2] == 1:  # beside one frame there are only zeros: the middle tap is all there is
        frame = F.conv2d(
            x[:, :, 0], conv.weight[:, :, size // 2], conv.bias, conv.stride[1:], space_pad, groups=conv.groups
        )
        return frame.unsqueeze(2)
    frames = (x.shape[2] + 2 * pad - size) // stride + 1
    step = _frames_per_call(conv, x)
    if step >= frames:
        return conv(x)
    pieces = []
    for start in range(0, frames, step):
        first = start * stride - pad
        last = (min(start + step, frames) - 1) * stride - pad + size
        piece = x[:, :, max(first, 0) : min(last, x.shape[2])]
        piece = F.pad(piece, (0, 0, 0, 0, max(-first, 0), max(last - x.shape[2], 0)))
        pieces.append(F.conv3d(piece, conv.weight, conv.bias, conv.stride, (0, *space_pad), groups=conv.groups))
    return torch.cat(pieces, dim=2)


def _frames_per_call(conv: nn.Conv3d, x: Tensor) -> int:
    """Largest number of output frames of one call whose padded input and output stay below the index limit."""
    batch, channels, _, height, width = x.shape
    area_in = batch * channels * (height + conv.kernel_size[1]) * (width + conv.kernel_size[2])
    area_out = batch * conv.out_channels * (height // conv.stride[1] + 1) * (width // conv.stride[2] + 1)
    inside = (INDEX_LIMIT // area_in - conv.kernel_size[0]) // conv.stride[0]
    return max(min(inside, INDEX_LIMIT // area_out), 1)


class RMSNorm3d(nn.Module):
    """RMS normalisation over the channels of every position, with weight and bias; computed in float32 or wider."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out, dtype kept."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.eps)
        weight, bias = (p.to(wide.dtype).reshape(-1, 1, 1, 1) for p in (self.weight, self.bias))
        return torch.addcmul(bias, wide * scale, weight).to(x.dtype)


class ConvLayer(nn.Module):
    """Convolution with zero padding of half its kernel on all sides, then (optionally) RMS norm and SiLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int | Factor = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        act: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.norm = RMSNorm3d(out_channels) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T', H', W']``."""
        x = convolve(self.conv, x)
        if self.norm is not None:
            x = self.norm(x)
        return F.silu(x) if self.act else x


class OpSequential(nn.Module):
    """Modules one after the other, each under activation checkpointing when switched on and training."""

    def __init__(self, ops: Sequence[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)
        self.grad_checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        """What the modules make of ``x``."""
        for op in self.op_list:
            if self.grad_checkpoint and self.training:
                x = checkpoint(op, x, use_reentrant=False)
            else:
                x = op(x)
        return x


class Residual(nn.Module):
    """``x + main(x)``."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out."""
        return x + self.main(x)


class ConvPair(nn.Module):
    """Convolution with SiLU, then convolution with RMS norm: the body of a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, act=True)
        self.conv2 = ConvLayer(channels, channels, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out."""
        return self.conv2(self.conv1(x))


class LiteMLA(nn.Module):
    """Linear attention with ReLU kernel over all positions, at two scales (EfficientViT, section 3.1).

    Every head sees, beside its own queries, keys and values, a second set gathered from 5x5x5 neighbourhoods.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        heads = channels // HEAD_DIM
        self.qkv = ConvLayer(channels, 3 * channels, 1, bias=False)
        depthwise = Conv3d(3 * channels, 3 * channels, 5, padding=2, groups=3 * channels, bias=False)
        per_head = nn.Conv3d(3 * channels, 3 * channels, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(depthwise, per_head)])
        self.proj = ConvLayer(2 * channels, channels, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out."""
        near = self.qkv(x)
        wide = near
        for conv in self.aggreg[0]:  # type: ignore[attr-defined]
            wide = convolve(conv, wide)
        qkv = torch.cat([near, wide], dim=1).flatten(2).unflatten(1, (-1, 3 * HEAD_DIM))  # [B, 2 heads, 96, T*H*W]
        out = linear_attention(*qkv.chunk(3, dim=2))
        return self.proj(out.flatten(1, 2).unflatten(2, x.shape[2:]))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``out_n = sum_m v_m (k_m . q_n) / (sum_m k_m . q_n + 1e-15)`` with rectified q and k.

    Sums over all positions overflow or round badly in half precision, so it works in float32 or wider.

    Args:
        q, k, v: ``[..., D, N]``, N positions of D channels.

    Returns:
        ``[..., D, N]`` in the dtype of ``q``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    kind = q.device.type
    # Not every device knows autocast: shapes are also worked out on the meta device.
    with torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
        wide_q, wide_k = F.relu(q.to(dtype)), F.relu(k.to(dtype))
        state = v.to(dtype) @ wide_k.transpose(-1, -2)  # [..., D, D]
        total = wide_k.sum(dim=-1, keepdim=True).transpose(-1, -2) @ wide_q  # [..., 1, N]
        return ((state @ wide_q) / (total + 1e-15)).to(q.dtype)


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: expand by 4 (twice, for the gate), depthwise convolution, gate, project."""

    def __init__(self, channels: int, expand: int = 4) -> None:
        super().__init__()
        hidden = expand * channels
        self.inverted_conv = ConvLayer(channels, 2 * hidden, 1, act=True)
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, groups=2 * hidden)
        self.point_conv = ConvLayer(hidden, channels, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out."""
        value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate))


class EfficientViTBlock(nn.Module):
    """Linear attention for context, gated convolution for detail, each with its residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.context_module = Residual(LiteMLA(channels))
        self.local_module = Residual(GLUMBConv(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out."""
        return self.local_module(self.context_module(x))


def average_channels(x: Tensor, channels: int) -> Tensor:
    """Mean over consecutive groups of channels: ``[B, C, ...] -> [B, channels, ...]``."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """Every channel several times in a row: ``[B, C, ...] -> [B, channels, ...]``."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def space_to_channel(x: Tensor, factor: Factor) -> Tensor:
    """``[B, C, T, H, W] -> [B, C r_t r_h r_w, T/r_t, H/r_h, W/r_w]``, offsets ordered (time, row, column) after C.

    Written as a permutation, since torch's pixel_unshuffle refuses single-frame videos on some devices.
    """
    (batch, channels, *size), (rt, rh, rw) = x.shape, factor
    t, h, w = (length // ratio for length, ratio in zip(size, factor))
    x = x.reshape(batch, channels, t, rt, h, rh, w, rw).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(batch, channels * rt * rh * rw, t, h, w)


def channel_to_space(x: Tensor, factor: Factor) -> Tensor:
    """Inverse of `space_to_channel`."""
    (batch, channels, t, h, w), (rt, rh, rw) = x.shape, factor
    channels //= rt * rh * rw
    x = x.reshape(batch, channels, rt, rh, rw, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, channels, t * rt, h * rh, w * rw)


class Downsample(nn.Module):
    """Strided convolution plus the input with space moved to channels and averaged.

    Halves height and width, and with ``temporal`` the frames too (a single frame stays one).
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.out_channels = out_channels
        self.main = ConvLayer(in_channels, out_channels, stride=(2 if temporal else 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T or T/2, H/2, W/2]``."""
        factor = (2 if self.temporal and x.shape[2] > 1 else 1, 2, 2)
        return self.main(x) + average_channels(space_to_channel(x, factor), self.out_channels)


class InterpolateConv(nn.Module):
    """Nearest-neighbour enlargement, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels)

    def forward(self, x: Tensor, factor: Factor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', r_t T, r_h H, r_w W]``."""
        return self.conv(upsample_nearest(x, factor))


class Upsample(nn.Module):
    """Enlargement with a convolution plus the input with repeated channels moved to space; inverts `Downsample`."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.out_channels = out_channels
        self.main = InterpolateConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T or 2T, 2H, 2W]``."""
        factor = (2 if self.temporal and x.shape[2] > 1 else 1, 2, 2)
        shortcut = channel_to_space(repeat_channels(x, self.out_channels * 4 * factor[0]), factor)
        return self.main(x, factor) + shortcut
