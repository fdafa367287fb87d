"""The causal 3D video autoencoder (HunyuanVideo, arXiv:2412.03603)."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config.keys import given_config
from opensora.models.autoencoder import Autoencoder, LatentMoments, LatentSpec, listed
from opensora.models.hunyuan_vae.blocks import CausalConv3d
from opensora.models.hunyuan_vae.config import HunyuanVAEConfig
from opensora.models.hunyuan_vae.encoder_decoder import DecoderCausal3D, EncoderCausal3D
from opensora.models.kinds import Shapes, WeightKind, count, explain_autoencoder, size
from opensora.models.vae.disturbance import disturbed
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.shapes import check_latents, check_pixels
from opensora.models.vae.tiling import Tiling
from opensora.registry import MODELS
from opensora.utils.errors import UserError
from opensora.utils.weights_loading import load_model


class AutoencoderKLCausal3D(nn.Module, Autoencoder):
    """Variational autoencoder of videos ``[B, 3, 4k+1, 8h, 8w]`` in [-1, 1] and latents ``[B, C, k+1, h, w]``.

    State-dict keys are those of the released file.
    """

    scaling_keys = ("scale_factor", "shift_factor")
    supports_grad_checkpoint = True
    tiling: Tiling

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.tiling = config.tiling()
        self.encoder = EncoderCausal3D(config)
        self.decoder = DecoderCausal3D(config)
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

    def get_last_layer(self) -> Tensor:
        """Weight of the last convolution (where the adaptive GAN weight compares gradients)."""
        return self.decoder.conv_out.conv.weight

    def set_grad_checkpoint(self, enabled: bool = True, last_layer: bool = True) -> None:
        """Recompute the activations of every block in the backward pass; the last layer is in none."""
        self.encoder.grad_checkpoint = self.decoder.grad_checkpoint = enabled

    @torch.no_grad()
    def inflate_from_images(self) -> bool:
        """Move each causal kernel's weight to its last (current-frame) tap, in place.

        On a single frame all taps see the same picture, so training there only shapes their sum: the sum goes to the
        tap of the current frame and the others start at zero. Every frame is then coded as the picture it was trained
        as, and training on videos begins from there ("centre inflation", as in I3D, arXiv:1705.07750, for causal
        kernels).
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size > 1:
                weight = module.conv.weight
                total = weight.sum(dim=2)
                weight.zero_()
                weight[:, :, -1] = total
        return True

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

    def scale_text(self, moments: LatentMoments) -> str:
        """A number per channel for both keys."""
        return f"scale_factor={listed(1 / moments.std)},\nshift_factor={listed(moments.mean)},"

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
        return self.tiling.encode(x, lambda tile: self.quant_conv(self.encoder(tile)))

    def encode_posterior(self, x: Tensor) -> DiagonalGaussian:
        """Posterior over *raw* latents."""
        return DiagonalGaussian(self.encode_moments(x))

    def encode_stored(self, x: Tensor) -> Tensor:
        """Posterior moments, see :meth:`encode_moments`."""
        return self.encode_moments(x)

    def from_stored(
        self, stored: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True
    ) -> Tensor:
        """Normalised latents ``[B, C, t, h, w]`` of posterior moments ``[B, 2C, t, h, w]``."""
        return self._latent(DiagonalGaussian(stored), sample_posterior, generator)

    def _latent(self, posterior: DiagonalGaussian, sample: bool, generator: torch.Generator | None) -> Tensor:
        return self.normalize(posterior.sample(generator) if sample else posterior.mode())

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents ``[B, C, t, h, w]`` to video ``[B, 3, 4(t-1)+1, 8h, 8w]``, about [-1, 1]."""
        check_latents(z, self.latent_channels)
        raw = self.denormalize(z)
        if self.config.use_slicing and raw.shape[0] > 1:
            return torch.cat([self._decode(sample) for sample in raw.split(1)])
        return self._decode(raw)

    def decode_parts(self, z: Tensor) -> Iterator[Tensor]:
        """A part for each tile of time."""
        if not self.tiling.cuts_time(z.shape[2]):
            return super().decode_parts(z)
        return self.tiling.decode_parts(self.denormalize(z), self._decode_tile)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.tiling.decode(raw, self._decode_tile)

    def _decode_tile(self, tile: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(tile))

    def forward(
        self,
        x: Tensor,
        sample_posterior: bool = True,
        generator: torch.Generator | None = None,
        latent_noise: float = 0.0,
    ) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """Reconstruct: ``(reconstruction like x, posterior, normalised latents)``."""
        posterior = self.encode_posterior(x)
        z = self._latent(posterior, sample_posterior, generator)
        return self.decode(disturbed(z, latent_noise, generator)), posterior, z

    def _check_pixels(self, x: Tensor) -> None:
        check_pixels(x, self.config.in_channels)
        frames, height, width = x.shape[-3:]
        space = self.compression[1]
        nearest = self.nearest_frames(frames)
        if frames not in nearest:
            raise UserError(
                f"{frames} frames do not fit the causal VAE, which takes {LatentSpec.of(self).rule}: "
                f"use {' or '.join(map(str, nearest))}"
            )
        if height % space or width % space:
            raise UserError(f"{height}x{width} pixels: height and width must be multiples of {space} for this VAE")


def fields_of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Fields of `HunyuanVAEConfig` that the shapes in a file determine."""

    def channels(blocks: str) -> list[int]:
        return [size(shapes, f"{blocks}{i}.resnets.0.conv1.conv.weight") for i in range(count(shapes, blocks))]

    encoder, decoder = channels("encoder.down_blocks."), channels("decoder.up_blocks.")[::-1]
    return {
        "latent_channels": size(shapes, "post_quant_conv.weight"),
        "block_out_channels": encoder,
        "decoder_block_out_channels": None if decoder == encoder else decoder,
        "layers_per_block": count(shapes, "encoder.down_blocks.0.resnets."),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


@MODELS.register_module("hunyuan_vae")
@WeightKind("a causal video autoencoder", "encoder.down_blocks.0.resnets.0.conv1.conv.weight")
def build_hunyuan_vae(
    config: HunyuanVAEConfig | str | None = None,
    device_map: str | torch.device = "cpu",
    torch_dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> AutoencoderKLCausal3D:
    """Build a causal VAE, with weights from a file or freshly initialised.

    Args:
        config: layout, tiling, and the file of the weights (see `opensora.utils.weights.resolve_path`).
        device_map: device of the model; "meta" builds it without memory.
        torch_dtype: dtype of the weights.
        **keys: those of `HunyuanVAEConfig` instead.

    Raises:
        UserError: config or weights that do not fit; the message names the key.
    """
    own = given_config(HunyuanVAEConfig, config, keys, "ae")
    return load_model(
        lambda: AutoencoderKLCausal3D(own),
        own.from_pretrained,
        device_map,
        torch_dtype,
        explain=partial(explain_autoencoder, "hunyuan_vae", vars(own), fields_of_shapes),
        cache_dir=own.cache_dir,
    )
