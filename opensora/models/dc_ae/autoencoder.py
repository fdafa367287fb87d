"""The deep-compression video autoencoder (DC-AE, arXiv:2410.10733, with a time axis)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.config.keys import given_config
from opensora.models.autoencoder import Autoencoder, LatentMoments, LatentSpec
from opensora.models.dc_ae.blocks import (
    ConvLayer,
    ConvPair,
    Downsample,
    EfficientViTBlock,
    OpSequential,
    Residual,
    RMSNorm3d,
    Upsample,
    average_channels,
    repeat_channels,
)
from opensora.models.dc_ae.config import DEFAULT_LAYOUT, DCAEConfig, Stage
from opensora.models.kinds import Shapes, WeightKind, count, explain_autoencoder, size
from opensora.models.vae.disturbance import disturbed
from opensora.models.vae.shapes import check_latents, check_pixels
from opensora.models.vae.tiling import Tiling
from opensora.registry import MODELS
from opensora.utils.errors import UserError
from opensora.utils.hub import RELEASED
from opensora.utils.logging import get_logger
from opensora.utils.weights_loading import load_model

logger = get_logger(__name__)

WEIGHTS = {DEFAULT_LAYOUT: "F32T4C128_AE.safetensors"}  # released file of each layout


def _blocks(stage: Stage) -> list[nn.Module]:
    if stage.block == "ResBlock":
        return [Residual(ConvPair(stage.width)) for _ in range(stage.depth)]
    return [EfficientViTBlock(stage.width) for _ in range(stage.depth)]


class ProjectToLatent(nn.Module):
    """Convolution to the latent's channels plus the averaged channels of the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.main = OpSequential([ConvLayer(in_channels, out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, t, h, w] -> [B, C', t, h, w]``."""
        return self.main(x) + average_channels(x, self.out_channels)


class ProjectFromLatent(nn.Module):
    """Convolution from the latent's channels plus the repeated channels of the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.main = ConvLayer(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, t, h, w] -> [B, C', t, h, w]``."""
        return self.main(x) + repeat_channels(x, self.out_channels)


class Encoder(nn.Module):
    """Pixels ``[B, 3, T, H, W]`` to latents ``[B, C, T/4, H/32, W/32]``; a single frame stays one."""

    def __init__(self, stages: Sequence[Stage], latent_channels: int) -> None:
        super().__init__()
        self.project_in = ConvLayer(3, stages[0].width)
        self.stages = nn.ModuleList()
        for stage, coarser in zip(stages, [*stages[1:], None]):
            ops = _blocks(stage)
            if coarser is not None:
                ops.append(Downsample(stage.width, coarser.width, stage.temporal))
            self.stages.append(OpSequential(ops))
        self.project_out = ProjectToLatent(stages[-1].width, latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    """Latents ``[B, C, t, h, w]`` to pixels ``[B, 3, 4t, 32h, 32w]``; a single frame stays one."""

    def __init__(self, stages: Sequence[Stage], latent_channels: int) -> None:
        super().__init__()
        self.grad_checkpoint_output = False
        self.project_in = ProjectFromLatent(latent_channels, stages[-1].width)
        self.stages = nn.ModuleList()  # numbered as in the encoder: run from the last to the first
        for stage, coarser in zip(stages, [*stages[1:], None]):
            ops: list[nn.Module] = []
            if coarser is not None:
                ops.append(Upsample(coarser.width, stage.width, stage.temporal))
            self.stages.append(OpSequential(ops + _blocks(stage)))
        width = stages[0].width
        self.project_out = OpSequential([RMSNorm3d(width), nn.ReLU(), ConvLayer(width, 3)])

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.project_in(z)
        for stage in reversed(self.stages):
            x = stage(x)
        if self.grad_checkpoint_output and self.training:
            return checkpoint(self.project_out, x, use_reentrant=False)
        return self.project_out(x)


class DCAE(nn.Module, Autoencoder):
    """Autoencoder of videos ``[B, 3, 4t, 32h, 32w]`` in [-1, 1] and latents ``[B, C, t, h, w]``, without a posterior.

    Images are videos of one frame and have one latent frame. So have videos of four frames: a latent of one frame
    always decodes to an image. State-dict keys are those of the released file.
    """

    supports_grad_checkpoint = True
    tiling: Tiling

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.tiling = config.tiling()
        channels, encoder, decoder = config.layout
        self.encoder = Encoder(encoder, channels)
        self.decoder = Decoder(decoder, channels)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def latent_channels(self) -> int:
        """Number of latent channels C."""
        return self.config.layout.latent_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""
        return self.config.compression

    @property
    def is_causal(self) -> bool:
        """Every latent frame stands for the same number of frames: frame counts are 4k."""
        return False

    def get_last_layer(self) -> Tensor:
        """Weight of the last convolution (where the adaptive GAN weight compares gradients)."""
        return self.decoder.project_out.op_list[2].conv.weight  # type: ignore[union-attr, return-value]

    def set_grad_checkpoint(self, enabled: bool = True, last_layer: bool = True) -> None:
        """Recompute the activations of every block in the backward pass (see ``disc_off_grad_ckpt``)."""
        last_layer = last_layer and not self.config.disc_off_grad_ckpt
        for stage in (*self.encoder.stages, *self.decoder.stages):
            stage.grad_checkpoint = enabled  # type: ignore[assignment]
        self.decoder.grad_checkpoint_output = enabled and last_layer

    @torch.no_grad()
    def inflate_from_images(self) -> bool:
        """Set all taps of the kernels but the middle one in time to zero, in place.

        On a single frame only the middle tap sees anything, so training there leaves the others as they were drawn.
        With them at zero, convolutions treat every frame as the picture they were trained on, and training on videos
        begins from there ("centre inflation", as in I3D, arXiv:1705.07750). Attention and the shortcuts between stages
        work across frames from the first step, so that clips are only coded about as well as pictures.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                middle = module.kernel_size[0] // 2
                module.weight[:, :, :middle] = 0
                module.weight[:, :, middle + 1 :] = 0
        return True

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents divided by ``scaling_factor``."""
        return raw / self._scale

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of :meth:`normalize`."""
        return z * self._scale

    def scale_text(self, moments: LatentMoments) -> str:
        """One number for all channels."""
        return f"scaling_factor={moments.overall[1]:.4f},"

    def encode_stored(self, x: Tensor) -> Tensor:
        """Video to latents; the scaled ones, so ``scaling_factor`` is part of what is stored.

        Args:
            x: ``[B, 3, T, H, W]`` in [-1, 1]; T is 1 or a multiple of 4, H and W multiples of 32.

        Returns:
            ``[B, C, T/4, H/32, W/32]``, divided by ``scaling_factor``.

        Raises:
            UserError: sizes that do not fit; names the nearest.
        """
        self._check_pixels(x)
        return self.normalize(self._per_sample(x, lambda sample: self.tiling.encode(sample, self.encoder)))

    def from_stored(
        self, stored: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True
    ) -> Tensor:
        """The stored latents themselves: there is no posterior to draw from."""
        return stored

    def decode(self, z: Tensor) -> Tensor:
        """Latents ``[B, C, t, h, w]`` (as `encode` gives) to video ``[B, 3, 4t, 32h, 32w]``, about [-1, 1].

        One latent frame becomes one frame. In temporal tiling this holds for a last tile of one latent frame too, as
        in the original: with the default tiles, 6k + 1 latent frames (above 8) give 4 (t - 1) + 1 frames.
        """
        check_latents(z, self.latent_channels)
        video = self._per_sample(self.denormalize(z), lambda sample: self.tiling.decode(sample, self.decoder))
        self._warn_of_lost_frames(z.shape[2], video.shape[2])
        return video

    def decode_parts(self, z: Tensor) -> Iterator[Tensor]:
        """A part for each tile of time."""
        if not self.tiling.cuts_time(z.shape[2]):
            yield self.decode(z)
            return
        frames = 0
        for part in self.tiling.decode_parts(self.denormalize(z), self.decoder):
            frames += part.shape[2]
            yield part
            del part
        self._warn_of_lost_frames(z.shape[2], frames)

    def _warn_of_lost_frames(self, latent_frames: int, frames: int) -> None:
        expected = latent_frames * self.compression[0]
        if latent_frames > 1 and frames < expected:
            logger.warning(
                "%d latent frames leave one for the last temporal tile, which decodes to a single frame: %d frames "
                "instead of %d; another ae.temporal_tile_size keeps them all",
                latent_frames,
                frames,
                expected,
            )

    def forward(
        self,
        x: Tensor,
        sample_posterior: bool = True,
        generator: torch.Generator | None = None,
        latent_noise: float = 0.0,
    ) -> tuple[Tensor, None, Tensor]:
        """Reconstruct: ``(reconstruction in the dtype of x, None, latents)``; works in the dtype of the weights."""
        z = self.encode(x.to(self.get_last_layer().dtype))
        return self.decode(disturbed(z, latent_noise, generator)).to(x.dtype), None, z

    @property
    def _scale(self) -> float:
        scale = self.config.scaling_factor
        return 1.0 if scale is None or self.config.is_training else scale

    def _per_sample(self, x: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        if self.config.is_training or x.shape[0] == 1:
            return network(x)
        return torch.cat([network(sample) for sample in x.split(1)])

    def _check_pixels(self, x: Tensor) -> None:
        check_pixels(x, 3)
        frames, height, width = x.shape[-3:]
        rows, columns = self.compression[1:]
        nearest = self.nearest_frames(frames)
        if frames not in nearest:
            raise UserError(
                f"{frames} frames do not fit the deep-compression autoencoder, which takes 1 or "
                f"{LatentSpec.of(self).rule}: use {' or '.join(map(str, nearest))}"
            )
        if height % rows or width % columns:
            raise UserError(
                f"{height}x{width} pixels: height and width must be multiples of {rows} for this autoencoder; "
                f"nearest: {_nearest(height, rows)}x{_nearest(width, columns)}"
            )


def _nearest(size: int, ratio: int) -> int:
    return max(round(size / ratio), 1) * ratio


def fields_of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Fields of the layout that the shapes in a file determine, by their config keys."""
    # every encoder stage but the last ends in a downsampler
    steps = [count(shapes, f"encoder.stages.{i}.op_list.") - 1 for i in range(count(shapes, "encoder.stages."))]
    return {
        "latent_channels": size(shapes, "decoder.project_in.main.conv.weight", 1),
        "encoder.depth_list": [*steps[:-1], steps[-1] + 1] if steps else [],
    }


def released_weights(config: DCAEConfig) -> str | None:
    """Hub path of the weights released for a layout; None where it is changed or from scratch."""
    return "/".join(RELEASED[WEIGHTS[config.model_name]]) if config.is_released else None


@MODELS.register_module("dc_ae")
@WeightKind("a deep-compression video autoencoder", "encoder.project_in.conv.weight", released=released_weights)
def build_dc_ae(
    config: DCAEConfig | str | None = None,
    device_map: str | torch.device = "cpu",
    torch_dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> DCAE:
    """Build a deep-compression autoencoder, with weights from a file, from the hub, or freshly initialised.

    Args:
        config: layout, scaling, tiling, and the file of the weights (see `opensora.utils.weights.resolve_path`).
            ``strict_load=False`` tolerates tensors of the file that the model does not have.
        device_map: device of the model; "meta" builds it without memory or weights.
        torch_dtype: dtype of the weights.
        **keys: those of `DCAEConfig` instead.

    Raises:
        UserError: config or weights that do not fit; the message names the key.
    """
    own = given_config(DCAEConfig, config, keys, "ae")
    device, layout = torch.device(device_map), own.layout
    values = {
        "latent_channels": layout.latent_channels,
        "encoder.depth_list": [stage.depth for stage in layout.encoder],
    }
    return load_model(
        lambda: DCAE(own),
        own.from_pretrained or (None if device.type == "meta" else released_weights(own)),
        device,
        torch_dtype,
        explain=partial(explain_autoencoder, "dc_ae", values, fields_of_shapes),
        allow_unexpected=() if own.strict_load else ("",),
        cache_dir=own.cache_dir,
    )
