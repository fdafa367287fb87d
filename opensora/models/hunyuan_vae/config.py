"""Layout and options of the causal 3D video autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass

from opensora.models.vae.tiling import Tiling
from opensora.utils.errors import UserError


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
