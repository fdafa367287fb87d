"""Layout and options of the causal 3D video autoencoder."""

# ruff: noqa: RUF009 - opt() makes dataclass fields

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from opensora.config.options import MAX_DEPTH, MAX_WIDTH, ModelOptions, opt
from opensora.utils.errors import UserError

if TYPE_CHECKING:
    from opensora.models.vae.tiling import Tiling


@dataclass(frozen=True, kw_only=True)
class HunyuanVAEConfig(ModelOptions):
    """Causal 3D autoencoder (`hunyuan_vae`); the defaults are those of the released weights.

    ``scale_factor`` and ``shift_factor`` map raw latents to about unit variance, ``z = scale * (raw - shift)``; each is
    one number for all channels or a list with one per latent channel.

    Raises:
        UserError: sizes that do not fit together.
    """

    key_prefix: ClassVar[str] = "ae."

    act_fn: Literal["silu"] = opt("silu", "activation", no_effect="there is only this one")
    in_channels: int = opt(3, "channels of the video", least=1, most=MAX_WIDTH)
    out_channels: int = opt(3, "channels of the output", least=1, most=MAX_WIDTH)
    latent_channels: int = opt(16, "channels of the latent", least=1, most=MAX_WIDTH)
    layers_per_block: int = opt(2, "residual layers per stage", least=1, most=MAX_DEPTH)
    norm_num_groups: int = opt(32, "groups of each GroupNorm", least=1, most=MAX_WIDTH)
    scale_factor: float | list[float] = opt(0.476986, "latents are multiplied by it")
    shift_factor: float | list[float] = opt(0.0, "subtracted from latents before scaling")
    time_compression_ratio: int = opt(4, "frames per latent frame", "frames", least=1)
    spatial_compression_ratio: int = opt(8, "pixels per latent pixel side", "px", least=1)
    mid_block_add_attention: bool = opt(True, "attention in the middle block")
    block_out_channels: list[int] = opt([128, 256, 512, 512], "channels per stage", least=1, most=MAX_WIDTH)
    decoder_block_out_channels: list[int] | None = opt(
        None, "channels per stage of the decoder, counted as the encoder's; None: the same", least=1, most=MAX_WIDTH
    )
    sample_size: int = opt(256, "side of a spatial tile", "px", least=1)
    sample_tsize: int = opt(64, "length of a temporal tile", "frames", least=1)
    tile_overlap_factor: float = opt(0.25, "share of a tile that overlaps the next", least=0, below=1)
    use_slicing: bool = opt(False, "one batch item at a time")
    use_spatial_tiling: bool = opt(False, "encode and decode in spatial tiles")
    use_temporal_tiling: bool = opt(False, "encode and decode in temporal tiles")
    dropout: float = opt(0.0, "dropout in residual layers", least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels("block_out_channels", self.block_out_channels)
        self._check_channels("decoder_block_out_channels", self.decoder_channels)
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

    @property
    def decoder_channels(self) -> list[int]:
        """Channels of the decoder's stages, the finest first, as in ``block_out_channels``."""
        wide = self.decoder_block_out_channels
        return self.block_out_channels if wide is None else wide

    def _check_channels(self, name: str, levels: Sequence[int]) -> None:
        for channels in levels:
            if channels < 1 or channels % self.norm_num_groups:
                raise UserError(
                    f"ae.{name}: {channels} channels; every level needs a multiple of "
                    f"ae.norm_num_groups={self.norm_num_groups}"
                )

    def _check_levels(self) -> None:
        """Each ratio is a power of 2 with a level for every halving; time is not halved after the last level."""
        levels = len(self.block_out_channels)
        if levels == 0:
            raise UserError("ae.block_out_channels is empty: give one number per level, such as [128, 256, 512, 512]")
        if len(self.decoder_channels) != levels:
            raise UserError(
                f"ae.decoder_block_out_channels={self.decoder_channels}: must have {levels} numbers, as many as "
                "ae.block_out_channels"
            )
        for name, halvings in (("spatial", levels), ("time", levels - 1)):
            ratio = getattr(self, f"{name}_compression_ratio")
            if ratio not in [2**n for n in range(halvings + 1)]:
                raise UserError(
                    f"ae.{name}_compression_ratio={ratio}: must be a power of 2, and with {levels} levels in "
                    f"ae.block_out_channels at most {2**halvings}"
                )

    def tiling(self) -> "Tiling":
        """The tiles these fields ask for."""
        from opensora.models.vae.tiling import Tiling  # needs torch, which reading a config does not

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
