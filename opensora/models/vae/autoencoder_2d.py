"""The image autoencoder of FLUX.1; registered as ``autoencoder_2d``.

A convolutional autoencoder with one attention layer, as in latent diffusion (arXiv:2112.10752). Videos are coded frame
by frame.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.config.keys import given_config
from opensora.models.autoencoder import Autoencoder, LatentMoments
from opensora.models.kinds import Shapes, WeightKind, count, explain_autoencoder, size
from opensora.models.vae.config import AutoEncoder2DConfig
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.shapes import IMAGE, check_latents, check_pixels
from opensora.registry import MODELS
from opensora.utils.errors import UserError
from opensora.utils.weights_loading import load_model


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, plus the (projected) input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C', H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head attention over all positions of an image."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` in and out, residual included."""
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1) for proj in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # [N, 1, H*W, C]
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` in and out."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """3x3 convolution of stride 2; zeros are added at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H/2, W/2]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, 2H, 2W]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next one, if there is one.

    Args:
        name: "downsample" or "upsample", which is also the key of the change.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, num_blocks: int, name: str, last: bool
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(num_blocks)
        )
        if not last:
            self.add_module(name, Downsample(out_channels) if name == "downsample" else Upsample(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``C'`` channels and half, twice or the same size."""
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self.get_submodule(name)(x)
        return x


class Encoder(nn.Module):
    """Pixels ``[N, 3, H, W]`` to posterior moments ``[N, 2 C, H/8, W/8]`` (mean, log-variance)."""

    def __init__(self, config: AutoEncoder2DConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c_out, groups, config.num_res_blocks, "downsample", last=i == len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip((config.ch, *widths), widths))
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Raw latents ``[N, C, h, w]`` to pixels ``[N, 3, 8h, 8w]``."""

    def __init__(self, config: AutoEncoder2DConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(  # numbered as in the encoder: run from the last to the first
            Level(c_in, c_out, groups, config.num_res_blocks + 1, "upsample", last=i == 0)
            for i, (c_in, c_out) in enumerate(zip((*widths[1:], widths[-1]), widths))
        )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder2D(nn.Module, Autoencoder):
    """Variational autoencoder of images ``[B, 3, 8h, 8w]`` in [-1, 1] and latents ``[B, C, h, w]``.

    Videos ``[B, 3, T, 8h, 8w]`` become latents ``[B, C, T, h, w]``, each frame on its own: there is nothing to inflate.
    It works neither in tiles nor with gradient checkpointing. State-dict keys are those of the released file.
    """

    scaling_keys = ("scale_factor", "shift_factor")

    def __init__(self, config: AutoEncoder2DConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def latent_channels(self) -> int:
        """Number of latent channels C."""
        return self.config.z_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""
        space = 2 ** (len(self.config.ch_mult) - 1)
        return (1, space, space)

    @property
    def is_causal(self) -> bool:
        """Frames do not depend on one another: any frame count goes."""
        return False

    def get_last_layer(self) -> Tensor:
        """Weight of the last convolution (where the adaptive GAN weight compares gradients)."""
        return self.decoder.conv_out.weight

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents to the scale the diffusion model works in."""
        return _per_channel(self.config.scale_factor, raw) * (raw - _per_channel(self.config.shift_factor, raw))

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of :meth:`normalize`."""
        return z / _per_channel(self.config.scale_factor, z) + _per_channel(self.config.shift_factor, z)

    def scale_text(self, moments: LatentMoments) -> str:
        """One number for all channels for both keys; there may be one for each (see the config)."""
        mean, std = moments.overall
        return f"scale_factor={1 / std:.4f},\nshift_factor={mean:.4f},"

    def encode_moments(self, x: Tensor) -> Tensor:
        """Raw posterior moments, mean and log-variance on the channel axis.

        Args:
            x: ``[B, 3, H, W]`` or ``[B, 3, T, H, W]`` in [-1, 1].

        Returns:
            ``[B, 2C, H/8, W/8]`` or ``[B, 2C, T, H/8, W/8]``.

        Raises:
            UserError: neither images nor videos, or H or W is not a multiple of the spatial ratio.
        """
        check_pixels(x, self.config.in_channels, IMAGE)
        height, width = x.shape[-2:]
        space = self.compression[1]
        if height % space or width % space:
            raise UserError(
                f"{height}x{width} pixels: height and width must be multiples of {space} for the image autoencoder"
            )
        return _per_frame(self.encoder, x)

    def encode_posterior(self, x: Tensor) -> DiagonalGaussian:
        """Posterior over *raw* latents."""
        return DiagonalGaussian(self.encode_moments(x))

    def encode_stored(self, x: Tensor) -> Tensor:
        """Posterior moments, see :meth:`encode_moments`."""
        return self.encode_moments(x)

    def from_stored(
        self, stored: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True
    ) -> Tensor:
        """Normalised latents ``[B, C, ...]`` of posterior moments ``[B, 2C, ...]``; their mean if the config says
        ``sample=False``."""
        return self._latent(DiagonalGaussian(stored), sample_posterior, generator)

    def _latent(self, posterior: DiagonalGaussian, sample: bool, generator: torch.Generator | None) -> Tensor:
        return self.normalize(posterior.sample(generator) if sample and self.config.sample else posterior.mode())

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents ``[B, C, h, w]`` or ``[B, C, T, h, w]`` to pixels, 8 times as high and wide."""
        check_latents(z, self.latent_channels, IMAGE)
        return _per_frame(self.decoder, self.denormalize(z))

    def forward(
        self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """Reconstruct: ``(reconstruction like x, posterior, normalised latents)``."""
        posterior = self.encode_posterior(x)
        z = self._latent(posterior, sample_posterior, generator)
        return self.decode(z), posterior, z


def _per_channel(value: float | Sequence[float], z: Tensor) -> float | Tensor:
    """One number as it is; one per channel in a shape that goes with latents ``[B, C, ...]``."""
    if isinstance(value, int | float):
        return value
    return torch.as_tensor(value, dtype=z.dtype, device=z.device).reshape(-1, *[1] * (z.ndim - 2))


def _per_frame(network: nn.Module, x: Tensor) -> Tensor:
    """Run a network for images on images, or on every frame of videos ``[B, C, T, H, W]``."""
    if x.ndim == 4:
        return network(x)
    return network(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def fields_of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Fields of `AutoEncoder2DConfig` that the shapes in a file determine."""
    base = size(shapes, "encoder.conv_in.weight")
    widths = [size(shapes, f"encoder.down.{i}.block.0.conv1.weight") for i in range(count(shapes, "encoder.down."))]
    return {
        "z_channels": size(shapes, "decoder.conv_in.weight", 1),
        "ch": base,
        "ch_mult": [width // max(base, 1) for width in widths],
        "num_res_blocks": count(shapes, "encoder.down.0.block."),
    }


@MODELS.register_module("autoencoder_2d")
@WeightKind("an image autoencoder", "encoder.down.0.block.0.conv1.weight")
def build_autoencoder_2d(
    config: AutoEncoder2DConfig | str | None = None,
    device_map: str | torch.device = "cpu",
    torch_dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> AutoEncoder2D:
    """Build an image autoencoder, with weights from a file or freshly initialised.

    Args:
        config: layout, scaling, and the file of the weights (see `opensora.utils.weights.resolve_path`).
            ``strict_load=False`` tolerates tensors of the file that the model does not have, such as those of a
            discriminator saved with it.
        device_map: device of the model; "meta" builds it without memory.
        torch_dtype: dtype of the weights.
        **keys: those of `AutoEncoder2DConfig` instead.

    Raises:
        UserError: config or weights that do not fit; the message names the key.
    """
    own = given_config(AutoEncoder2DConfig, config, keys, "ae")
    return load_model(
        lambda: AutoEncoder2D(own),
        own.from_pretrained,
        device_map,
        torch_dtype,
        explain=partial(explain_autoencoder, "autoencoder_2d", vars(own), fields_of_shapes),
        allow_unexpected=() if own.strict_load else ("",),
        cache_dir=own.cache_dir,
    )
