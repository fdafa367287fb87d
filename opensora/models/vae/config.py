"""Options of the image autoencoder and of the discriminator."""

# ruff: noqa: RUF009 - opt() makes dataclass fields

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from opensora.config.options import MAX_DEPTH, MAX_WIDTH, ModelOptions, opt
from opensora.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AutoEncoder2DConfig(ModelOptions):
    """Image autoencoder (`autoencoder_2d`); the defaults are those of the released weights.

    ``scale_factor`` and ``shift_factor`` map raw latents to about unit variance, ``z = scale * (raw - shift)``; each is
    one number for all channels or a list with one per latent channel. The network takes any ``resolution``.

    Raises:
        UserError: sizes that do not fit together.
    """

    strict_load: bool = opt(True, "refuse weights with missing or unexpected keys")
    resolution: int = opt(256, "side of the training images", "px", least=1)
    in_channels: int = opt(3, "channels of the image", least=1, most=MAX_WIDTH)
    ch: int = opt(128, "channels of the first stage", least=1, most=MAX_WIDTH)
    out_ch: int = opt(3, "channels of the output", least=1, most=MAX_WIDTH)
    ch_mult: list[int] = opt([1, 2, 4, 4], "channels per stage over ch", least=1, most=MAX_WIDTH)
    num_res_blocks: int = opt(2, "residual blocks per stage", least=1, most=MAX_DEPTH)
    z_channels: int = opt(16, "channels of the latent", least=1, most=MAX_WIDTH)
    norm_num_groups: int = opt(32, "groups of each GroupNorm", least=1, most=MAX_WIDTH)
    scale_factor: float | list[float] = opt(0.3611, "latents are multiplied by it")
    shift_factor: float | list[float] = opt(0.1159, "subtracted from latents before scaling")
    sample: bool = opt(True, "draw from the posterior instead of taking its mode")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ch_mult:
            raise UserError(
                "ch_mult of the image autoencoder is empty: give one number per level, such as [1, 2, 4, 4]"
            )
        for name in ("scale_factor", "shift_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and len(value) != self.z_channels:
                raise UserError(
                    f"{name} of the image autoencoder has {len(value)} numbers: give one, or one per latent channel "
                    f"({self.z_channels})"
                )
        if 0 in (self.scale_factor if isinstance(self.scale_factor, Sequence) else [self.scale_factor]):
            raise UserError("scale_factor of the image autoencoder: latents cannot be divided by 0 when decoding")
        for channels in (self.ch, *self.widths):
            if channels < 1 or channels % self.norm_num_groups:
                raise UserError(
                    f"ch={self.ch}, ch_mult={[*self.ch_mult]} of the image autoencoder: a level of {channels} "
                    f"channels; every level must be a multiple of norm_num_groups={self.norm_num_groups}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.ch * factor for factor in self.ch_mult)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(ModelOptions):
    """Patch discriminator over clips (`N_Layer_discriminator_3D`)."""

    key_prefix: ClassVar[str] = "discriminator."

    input_nc: int = opt(3, "channels of the video", least=1, most=MAX_WIDTH)
    ndf: int = opt(64, "channels of the first layer", least=1, most=MAX_WIDTH)
    n_layers: int = opt(5, "layers", least=1, most=MAX_DEPTH)
    conv_cls: Literal["conv3d"] = opt("conv3d", "kind of convolution", no_effect="there is only this one")
    dropout: float = opt(0.3, "dropout after each layer", least=0, below=1)
