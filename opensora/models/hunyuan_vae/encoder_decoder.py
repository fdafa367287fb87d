"""Encoder and decoder of the causal 3D autoencoder."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.models.hunyuan_vae.blocks import (
    CausalConv3d,
    DownBlockCausal3D,
    MidBlockCausal3D,
    UpBlockCausal3D,
    norm_silu,
)
from opensora.models.hunyuan_vae.config import HunyuanVAEConfig

Factor = tuple[int, int, int]


def level_factors(config: HunyuanVAEConfig) -> list[Factor | None]:
    """Resampling factor (time, height, width) after each encoder level, None where there is none.

    Space is halved at the first log2(space_ratio) levels; time at the last log2(time_ratio) levels before the final
    one, so early levels (which are the costly ones) keep every frame.
    """
    levels = len(config.block_out_channels)
    n_space = round(math.log2(config.spatial_compression_ratio))
    n_time = round(math.log2(config.time_compression_ratio))
    factors: list[Factor | None] = []
    for i in range(levels):
        space = 2 if i < n_space else 1
        time = 2 if levels - 1 - n_time <= i < levels - 1 else 1
        factors.append((time, space, space) if (time, space) != (1, 1) else None)
    return factors


class _CheckpointedStack(nn.Module):
    """Runs blocks in order, each under activation checkpointing when switched on and training."""

    grad_checkpoint = False

    def _run(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class EncoderCausal3D(_CheckpointedStack):
    """Pixels ``[B, 3, T, H, W]`` to moments ``[B, 2 C, (T-1)/4 + 1, H/8, W/8]`` (before ``quant_conv``)."""

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, channels[0], 3)
        inputs = [channels[0], *channels[:-1]]
        self.down_blocks = nn.ModuleList(
            DownBlockCausal3D(c_in, c_out, config.layers_per_block, groups, factor, config.dropout)
            for c_in, c_out, factor in zip(inputs, channels, level_factors(config))
        )
        self.mid_block = MidBlockCausal3D(channels[-1], groups, config.mid_block_add_attention, config.dropout)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self._run([*self.down_blocks, self.mid_block], self.conv_in(x))
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class DecoderCausal3D(_CheckpointedStack):
    """Latents ``[B, C, t, h, w]`` (after ``post_quant_conv``) to pixels ``[B, 3, 4(t-1) + 1, 8h, 8w]``."""

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        outputs, groups = [*reversed(config.decoder_channels)], config.norm_num_groups
        inputs = [outputs[0], *outputs[:-1]]
        self.conv_in = CausalConv3d(config.latent_channels, outputs[0], 3)
        self.mid_block = MidBlockCausal3D(outputs[0], groups, config.mid_block_add_attention, config.dropout)
        # Upsampling mirrors the encoder's counting (level 0 is the coarsest here), as in the released weights.
        self.up_blocks = nn.ModuleList(
            UpBlockCausal3D(c_in, c_out, config.layers_per_block + 1, groups, factor, config.dropout)
            for c_in, c_out, factor in zip(inputs, outputs, level_factors(config))
        )
        self.conv_norm_out = nn.GroupNorm(groups, outputs[-1], eps=1e-6)
        self.conv_out = CausalConv3d(outputs[-1], config.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self._run([self.mid_block, *self.up_blocks], self.conv_in(x))
        return self.conv_out(norm_silu(self.conv_norm_out, x))
