"""Building blocks of the causal 3D video autoencoder of HunyuanVideo (arXiv:2412.03603)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.hunyuan_vae.winograd import TILE, convolve_tile, tile_kernels
from opensora.models.vae.group_norm import group_norm

# Convolution and interpolation kernels index with 32 bits; larger tensors are processed in pieces along time.
INDEX_LIMIT = 2**31 - 1
MIN_TILE_AREA = 256  # elements of a frame; with smaller ones, transforming the kernels costs what the tiles save


def _triple(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else value


class CausalConv3d(nn.Module):
    """3D convolution that never looks at later frames.

    Width and height are replicate-padded by ``k // 2`` on both sides, time by ``k - 1`` in front only, so output frame
    ``i`` depends on input frames ``<= i * stride``.

    Args:
        in_channels, out_channels: channel counts.
        kernel_size: edge length of the cubic kernel (odd).
        stride: one number, or (time, height, width).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int | tuple[int, int, int] = 1
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = _triple(stride)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', ceil(T / s_t), ceil(H / s_h), ceil(W / s_w)]``."""
        if x.shape[2] == 1 and self.kernel_size > 1:
            return self._image(x)
        if self._tiles_pay(x):
            return self._in_tiles(x)
        return self._in_pieces(x, 0)

    def _in_pieces(self, x: Tensor, start: int) -> Tensor:
        """Output for the frames from ``start`` on, in as few convolutions as the index limit allows."""
        frames, length = self._frames_per_call(x), x.shape[2]
        if start + frames >= length:
            return self._video(x, start)
        return torch.cat([self._video(x[:, :, : begin + frames], begin) for begin in range(start, length, frames)], 2)

    def _padded(self, x: Tensor, start: int) -> Tensor:
        """Frames from ``start`` on, padded, with all earlier frames that a kernel reaches."""
        pad, context = self.kernel_size // 2, self.kernel_size - 1
        if not pad:
            return x[:, :, start:]
        front = max(context - start, 0)
        return F.pad(x[:, :, max(start - context, 0) :], (pad, pad, pad, pad, front, 0), mode="replicate")

    def _video(self, x: Tensor, start: int) -> Tensor:
        """Output for the frames from ``start`` (a multiple of the time stride) on."""
        return self.conv(self._padded(x, start))

    def _tiles_pay(self, x: Tensor) -> bool:
        """Whether `_in_tiles` is known to be faster: float32 on CPU, no gradients, frames that outweigh the kernels."""
        return (
            not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")  # would round the products, which partly cancel
            and x.dtype in (torch.float32, torch.float64)
            and self.kernel_size == 3
            and self.stride[0] == 1
            and x.shape[2] > TILE
            and x.shape[3] * x.shape[4] >= MIN_TILE_AREA
        )

    def _in_tiles(self, x: Tensor) -> Tensor:
        """The same with fewer multiplications, see `winograd`; only a tile's frames are ever padded."""
        frames = x.shape[2]
        first = self._image(x[:, :, :1])
        out = x.new_empty(*first.shape[:2], frames, *first.shape[3:])
        out[:, :, :1] = first
        kernels = tile_kernels(self.conv.weight)
        rest = frames - (frames - 1) % TILE
        tile = [self._padded_frame(x, 0)] * 2
        for start in range(1, rest, TILE):
            tile = [*tile[-2:], *(self._padded_frame(x, i) for i in range(start, start + TILE))]
            convolve_tile(tile, kernels, self.conv.bias, self.stride[1:], out[:, :, start : start + TILE].unbind(2))
        del tile
        if rest < frames:
            out[:, :, rest:] = self._in_pieces(x, rest)
        return out

    def _image(self, x: Tensor) -> Tensor:
        """One frame: its copies in front make all taps see the same picture, so the taps add up to a 2D kernel."""
        weight = self.conv.weight.sum(dim=2)
        return F.conv2d(self._padded_frame(x, 0), weight, self.conv.bias, self.stride[1:]).unsqueeze(2)

    def _padded_frame(self, x: Tensor, i: int) -> Tensor:
        """Frame ``i`` ``[B, C, H', W']``, padded in space."""
        pad = self.kernel_size // 2
        return F.pad(x[:, :, i], (pad, pad, pad, pad), mode="replicate")

    def _frames_per_call(self, x: Tensor) -> int:
        """Largest number of frames (a multiple of the time stride) whose tensors stay below the index limit."""
        batch, channels, _, height, width = x.shape
        pad = self.kernel_size - 1
        area_in = batch * channels * (height + pad) * (width + pad)
        area_out = batch * self.conv.out_channels * (height // self.stride[1]) * (width // self.stride[2])
        frames = INDEX_LIMIT // max(area_in, area_out // self.stride[0], 1) - pad
        return max(frames // self.stride[0], 1) * self.stride[0]


def upsample_nearest(x: Tensor, scale: tuple[int, int, int]) -> Tensor:
    """Nearest-neighbour upsampling of ``[B, C, T, H, W]`` by whole factors (time, height, width)."""
    if scale[0] != 1:
        x = x.repeat_interleave(scale[0], dim=2)
    batch, channels, frames, height, width = x.shape
    x = x[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, scale[1], -1, scale[2])
    return x.reshape(batch, channels, frames, height * scale[1], width * scale[2])


class UpsampleCausal3D(nn.Module):
    """Nearest upsampling then a causal convolution; the first frame is only enlarged in space (T -> s(T-1) + 1).

    Neighbouring samples of an enlarged tensor are equal, so its three kernel taps along an axis meet two distinct
    values. Without gradients, each of the output's interleaved phases is therefore convolved straight from the small
    input with a two-tap kernel (of summed taps): 3.4 times fewer operations, and the enlarged tensor is never built.
    """

    def __init__(self, channels: int, scale: tuple[int, int, int]) -> None:
        super().__init__()
        self.scale = scale
        self.conv = CausalConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C, s_t (T-1) + 1, s_h H, s_w W]``."""
        if self.scale[0] <= 2 and self.scale[1:] == (2, 2) and x.shape[2] > 1 and not torch.is_grad_enabled():
            return self._by_phases(x)
        if self.scale[0] > 1 and x.shape[2] > 1:
            # Repeating every frame and dropping the surplus copies of the first is the same as treating it apart.
            x = x.repeat_interleave(self.scale[0], dim=2)[:, :, self.scale[0] - 1 :]
        return self.conv(upsample_nearest(x, (1, *self.scale[1:])))

    def _by_phases(self, x: Tensor) -> Tensor:
        """The same result from the small input; pieces along time keep each convolution below the index limit."""
        batch, channels, frames, height, width = x.shape
        times = self.scale[0]
        context = 2 // times  # earlier frames that a kernel reaches
        step = max(INDEX_LIMIT // (batch * channels * (height + 2) * (width + 2)) - context, 1)
        out = x.new_empty(batch, self.conv.conv.out_channels, times * (frames - 1) + 1, 2 * height, 2 * width)
        for start in range(0, frames, step):
            piece = x[:, :, max(start - context, 0) : start + step]
            piece = F.pad(piece, (1, 1, 1, 1, max(context - start, 0), 0), mode="replicate")
            for phase in range(times):
                begin = times * start - (times - 1 - phase)
                skip = int(begin < 0)  # the first frame has no earlier copy
                target = out[:, :, begin + skip * times :: times]
                self._spatial_phases(piece[:, :, skip:], self._fold_time(phase), target)
        return out

    def _fold_time(self, phase: int) -> Tensor:
        """Kernel on the small input's frames; the earlier copy of a frame is preceded by two copies of the last one."""
        weight = self.conv.conv.weight
        return weight if self.scale[0] == 1 else fold_taps(weight, 2, first=phase == 0)

    def _spatial_phases(self, x: Tensor, weight: Tensor, target: Tensor) -> None:
        """Write the four interleaved pictures of padded ``x`` to ``target``'s first frames."""
        height, width = x.shape[3] - 1, x.shape[4] - 1
        for row in (0, 1):
            for column in (0, 1):
                kernel = fold_taps(fold_taps(weight, 3, first=row == 1), 4, first=column == 1)
                part = F.conv3d(x[:, :, :, row : row + height, column : column + width], kernel, self.conv.conv.bias)
                target[:, :, : part.shape[2], row::2, column::2] = part


def fold_taps(weight: Tensor, dim: int, first: bool) -> Tensor:
    """Three taps along ``dim`` as two: the first two added up if ``first``, else the last two."""
    a, b, c = weight.float().unbind(dim) if weight.dtype in (torch.float16, torch.bfloat16) else weight.unbind(dim)
    return torch.stack([a + b, c] if first else [a, b + c], dim).to(weight.dtype)


class DownsampleCausal3D(nn.Module):
    """Strided causal convolution."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` reduced by the stride."""
        return self.conv(x)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``silu(norm(x))``, without a second tensor where no backward pass needs both."""
    return F.silu(group_norm(norm, x), inplace=not torch.is_grad_enabled())


class ResnetBlockCausal3D(nn.Module):
    """GroupNorm, SiLU, causal convolution, twice, plus the (projected) input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T, H, W]``."""
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.dropout(norm_silu(self.norm2, h))  # frees what conv1 returned before conv2 runs
        h = self.conv2(h)
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """Single-head attention over all positions in which a token sees its own frame and earlier ones.

    The tokens of one frame share their set of visible keys, so frames are attended one after the other over a growing
    slice of keys: no mask of (T H W)^2 elements is ever built.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out, residual included."""
        batch, channels, frames, height, width = x.shape
        tokens = group_norm(self.group_norm, x.flatten(2)).transpose(1, 2)  # [B, T*H*W, C]
        q, k, v = (proj(tokens).unsqueeze(1) for proj in (self.to_q, self.to_k, self.to_v))
        area = height * width
        attended = [
            F.scaled_dot_product_attention(
                q[:, :, f * area : (f + 1) * area], k[:, :, : (f + 1) * area], v[:, :, : (f + 1) * area]
            )
            for f in range(frames)
        ]
        out = self.to_out[0](torch.cat(attended, dim=2).squeeze(1))
        return x + out.transpose(1, 2).reshape(batch, channels, frames, height, width)


class MidBlockCausal3D(nn.Module):
    """Residual block, frame-causal attention (optional), residual block."""

    def __init__(self, channels: int, groups: int, add_attention: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)] if add_attention else [])
        self.resnets = nn.ModuleList([ResnetBlockCausal3D(channels, channels, groups, dropout) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in and out."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlockCausal3D(nn.Module):
    """Residual blocks, then a downsampler unless ``stride`` is None."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        stride: tuple[int, int, int] | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlockCausal3D(in_channels if i == 0 else out_channels, out_channels, groups, dropout)
            for i in range(num_layers)
        )
        self.downsamplers = nn.ModuleList([DownsampleCausal3D(out_channels, stride)] if stride else [])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T', H', W']``."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlockCausal3D(nn.Module):
    """Residual blocks, then an upsampler unless ``scale`` is None."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        scale: tuple[int, int, int] | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlockCausal3D(in_channels if i == 0 else out_channels, out_channels, groups, dropout)
            for i in range(num_layers)
        )
        self.upsamplers = nn.ModuleList([UpsampleCausal3D(out_channels, scale)] if scale else [])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W] -> [B, C', T', H', W']``."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x
