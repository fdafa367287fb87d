"""The causal 3D video autoencoder (HunyuanVideo, arXiv:2412.03603)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.hunyuan_vae.encoder_decoder import DecoderCausal3D, EncoderCausal3D, level_factors
from opensora.models.kinds import Shapes, count, explain_autoencoder, size
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.tiling import Tiling, check_clip
from opensora.registry import MODELS
from opensora.utils.errors import UserError
from opensora.utils.weights_loading import load_model


@dataclass(frozen=True)
class HunyuanVAEConfig:
    """Architecture and tiling of the causal VAE; the defaults are those of the released weights.

    ``scale_factor`` and ``shift_factor`` map raw latents to about unit variance, ``z = scale * (raw - shift)``; each is
    one number for all channels or a list with one per latent channel.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scale_factor: float | Sequence[float] = 0.476986
    shift_factor: float | Sequence[float] = 0.0
    time_compression_ratio: int = 4
    spatial_compression_ratio: int = 8
    mid_block_add_attention: bool = True
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    sample_size: int = 256
    sample_tsize: int = 64
    use_slicing: bool = False
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    tile_overlap_factor: float = 0.25
    dropout: float = 0.0
    act_fn: str = "silu"

    def __post_init__(self) -> None:
        if self.act_fn != "silu":
            raise UserError(f"ae.act_fn={self.act_fn!r}: the causal VAE only has 'silu'")
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"ae.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"ae.dropout={self.dropout}: must be at least 0 and below 1")
        for channels in self.block_out_channels:
            if channels < 1 or channels % self.norm_num_groups:
                raise UserError(
                    f"ae.block_out_channels: {channels} channels; every level needs a multiple of "
                    f"ae.norm_num_groups={self.norm_num_groups}"
                )
        self._check_levels()
        for name in ("scale_factor", "shift_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and len(value) != self.latent_channels:
                raise UserError(
                    f"ae.{name} has {len(value)} numbers: give one, or one per latent channel ({self.latent_channels})"
                )
        if 0 in (self.scale_factor if isinstance(self.scale_factor, Sequence) else [self.scale_factor]):
            raise UserError(f"ae.scale_factor={self.scale_factor}: latents cannot be divided by 0 when decoding")
        self.tiling()  # refuses sizes that cannot be tiled

    def _check_levels(self) -> None:
        """Each ratio is a power of 2 with a level for every halving; time is not halved after the last level."""
        levels = len(self.block_out_channels)
        if levels == 0:
            raise UserError("ae.block_out_channels is empty: give one number per level, such as [128, 256, 512, 512]")
        for name, halvings in (("spatial", levels), ("time", levels - 1)):
            ratio = getattr(self, f"{name}_compression_ratio")
            if ratio not in [2**n for n in range(halvings + 1)]:
                raise UserError(
                    f"ae.{name}_compression_ratio={ratio}: must be a power of 2, and with {levels} levels in "
                    f"ae.block_out_channels at most {2**halvings}"
                )

    def tiling(self) -> Tiling:
        """The tiles these fields ask for."""
        space = self.spatial_compression_ratio
        return Tiling(
            compression=(self.time_compression_ratio, space, space),
            is_causal=True,
            spatial_tile=self.sample_size,
            temporal_tile=self.sample_tsize,
            overlap=self.tile_overlap_factor,
            use_spatial=self.use_spatial_tiling,
            use_temporal=self.use_temporal_tiling,
        )


class AutoencoderKLCausal3D(nn.Module):
    """Variational autoencoder of videos ``[B, 3, 4k+1, 8h, 8w]`` in [-1, 1] and latents ``[B, C, k+1, h, w]``.

    State-dict keys are those of the released file.
    """

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        self.config = config
        factors = level_factors(
            len(config.block_out_channels), config.time_compression_ratio, config.spatial_compression_ratio
        )
        common = (
            config.latent_channels,
            tuple(config.block_out_channels),
            config.layers_per_block,
            config.norm_num_groups,
            factors,
            config.mid_block_add_attention,
            config.dropout,
        )
        self.encoder = EncoderCausal3D(config.in_channels, *common)
        self.decoder = DecoderCausal3D(config.out_channels, *common)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, kernel_size=1)
        # A new model starts with little posterior noise (std 0.05): buried in unit noise, it would first learn to
        # ignore its latents and stay there long.
        log_variance = self.quant_conv.bias[config.latent_channels :]  # type: ignore[index]
        nn.init.constant_(log_variance, -6.0)

    @property
    def latent_channels(self) -> int:
        """Number of latent channels C."""
        return self.config.latent_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""
        space = self.config.spatial_compression_ratio
        return (self.config.time_compression_ratio, space, space)

    @property
    def is_causal(self) -> bool:
        """The first frame has a latent of its own: frame counts are 4k + 1."""
        return True

    def get_latent_size(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Latent (t, h, w) of a video of (T, H, W)."""
        (frames, height, width), (rt, rh, rw) = size, self.compression
        return ((frames - 1) // rt + 1, (height - 1) // rh + 1, (width - 1) // rw + 1)

    def get_last_layer(self) -> Tensor:
        """Weight of the last convolution (where the adaptive GAN weight compares gradients)."""
        return self.decoder.conv_out.conv.weight

    def set_grad_checkpoint(self, enabled: bool = True) -> None:
        """Recompute the activations of every block in the backward pass."""
        self.encoder.grad_checkpoint = self.decoder.grad_checkpoint = enabled

    def _affine(self, z: Tensor) -> tuple[Tensor, Tensor]:
        def broadcastable(value: float | Sequence[float]) -> Tensor:
            return torch.as_tensor(value, dtype=z.dtype, device=z.device).reshape(-1, 1, 1, 1)

        return broadcastable(self.config.scale_factor), broadcastable(self.config.shift_factor)

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents ``[B, C, t, h, w]`` to the scale the diffusion model works in."""
        scale, shift = self._affine(raw)
        return scale * (raw - shift)

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of :meth:`normalize`."""
        scale, shift = self._affine(z)
        return z / scale + shift

    def encode_moments(self, x: Tensor) -> Tensor:
        """Raw posterior moments ``[B, 2C, t, h, w]`` (mean, log-variance) of ``x [B, 3, T, H, W]`` in [-1, 1].

        Raises:
            UserError: T is not 4k + 1, or H or W is not a multiple of the spatial ratio.
        """
        self._check_pixels(x)
        if self.config.use_slicing and x.shape[0] > 1:
            return torch.cat([self._moments(sample) for sample in x.split(1)])
        return self._moments(x)

    def _moments(self, x: Tensor) -> Tensor:
        return self.config.tiling().encode(x, lambda tile: self.quant_conv(self.encoder(tile)))

    def encode_posterior(self, x: Tensor) -> DiagonalGaussian:
        """Posterior over *raw* latents."""
        return DiagonalGaussian(self.encode_moments(x))

    def encode(self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Video to normalised latents.

        Args:
            x: ``[B, 3, T, H, W]`` in [-1, 1], T = 4k + 1.
            sample_posterior: draw from the posterior, otherwise take its mean.
            generator: source of the posterior noise.

        Returns:
            ``[B, C, k+1, H/8, W/8]``.
        """
        posterior = self.encode_posterior(x)
        return self.normalize(posterior.sample(generator) if sample_posterior else posterior.mode())

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents ``[B, C, t, h, w]`` to video ``[B, 3, 4(t-1)+1, 8h, 8w]``, about [-1, 1]."""
        raw = self.denormalize(z)
        if self.config.use_slicing and raw.shape[0] > 1:
            return torch.cat([self._decode(sample) for sample in raw.split(1)])
        return self._decode(raw)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.config.tiling().decode(raw, lambda tile: self.decoder(self.post_quant_conv(tile)))

    def forward(
        self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """Reconstruct: ``(reconstruction like x, posterior, normalised latents)``."""
        posterior = self.encode_posterior(x)
        z = self.normalize(posterior.sample(generator) if sample_posterior else posterior.mode())
        return self.decode(z), posterior, z

    def _check_pixels(self, x: Tensor) -> None:
        check_clip(x, self.config.in_channels)
        frames, height, width = x.shape[-3:]
        ratio, space, _ = self.compression
        if (frames - 1) % ratio:
            lower = (frames - 1) // ratio * ratio + 1
            raise UserError(
                f"{frames} frames do not fit the causal VAE, which takes {ratio}k+1: use {lower} or {lower + ratio}"
            )
        if height % space or width % space:
            raise UserError(f"{height}x{width} pixels: height and width must be multiples of {space} for this VAE")


def fields_of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Fields of `HunyuanVAEConfig` that the shapes in a file determine."""
    level = "encoder.down_blocks.{}.resnets."
    return {
        "latent_channels": size(shapes, "post_quant_conv.weight"),
        "block_out_channels": [
            size(shapes, f"{level.format(i)}0.conv1.conv.weight") for i in range(count(shapes, "encoder.down_blocks."))
        ],
        "layers_per_block": count(shapes, level.format(0)),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


@MODELS.register_module("hunyuan_vae")
def build_hunyuan_vae(
    from_pretrained: str | None = None,
    device_map: str | torch.device = "cpu",
    torch_dtype: torch.dtype = torch.float32,
    **config: Any,
) -> AutoencoderKLCausal3D:
    """Build a causal VAE, with weights from a file or freshly initialised.

    Args:
        from_pretrained: weights (see `opensora.utils.weights.resolve_path`); empty for a new model.
        device_map: device of the model; "meta" builds it without memory.
        torch_dtype: dtype of the weights.
        **config: fields of `HunyuanVAEConfig`.

    Raises:
        UserError: config or weights that do not fit; the message names the key.
    """
    vae_config = HunyuanVAEConfig(**config)
    fields = {**vars(vae_config), "block_out_channels": [*vae_config.block_out_channels]}
    return load_model(
        lambda: AutoencoderKLCausal3D(vae_config),
        from_pretrained,
        device_map,
        torch_dtype,
        explain=partial(explain_autoencoder, "hunyuan_vae", fields, fields_of_shapes),
    )
