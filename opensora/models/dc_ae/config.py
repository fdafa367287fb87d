"""Layout and options of the deep-compression video autoencoder."""

# ruff: noqa: RUF009 - opt() and section() make dataclass fields

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from opensora.config.options import ModelOptions, Options, opt, section
from opensora.utils.errors import UserError
from opensora.utils.nearest import nearest_key

if TYPE_CHECKING:
    from opensora.models.vae.tiling import Tiling

BLOCK_TYPES = ("ResBlock", "EViTS5_GLU")
HEAD_DIM = 32  # channels of an attention head
DEFAULT_LAYOUT = "dc-ae-f32t4c128"
# What every layout of this family has in common; layout files may say it too.
COMMON = {"is_video": True, "norm": "rms3d", "act": "silu"}
FIXED = {
    "encoder": {
        **COMMON,
        "downsample_block_type": "Conv",
        "downsample_match_channel": True,
        "downsample_shortcut": "averaging",
        "out_norm": None,
        "out_act": None,
        "out_shortcut": "averaging",
    },
    "decoder": {
        **COMMON,
        "upsample_block_type": "InterpolateConv",
        "upsample_match_channel": True,
        "upsample_shortcut": "duplicating",
        "in_shortcut": "duplicating",
        "out_norm": "rms3d",
        "out_act": "relu",
    },
}


class Stage(NamedTuple):
    """One stage of an encoder or decoder.

    Attributes:
        width: channels.
        depth: blocks.
        block: "ResBlock" (convolutions) or "EViTS5_GLU" (linear attention and gated convolution).
        temporal: whether frames are halved (encoder: after the stage) or doubled (decoder: before it).
    """

    width: int
    depth: int
    block: str
    temporal: bool


@dataclass(frozen=True, kw_only=True)
class CoderConfig(Options):
    """Layout of one half, where it differs from the named one; lists have one entry per stage, finest first."""

    name: ClassVar[str]
    temporal_key: ClassVar[str]

    width_list: list[int] | None = opt(None, "channels per stage")
    depth_list: list[int] | None = opt(None, "blocks per stage")
    block_type: list[str] | str | None = opt(None, "block per stage: ResBlock, EViTS5_GLU")

    def stages(self, named: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """The named layout with these changes; keys that are None change nothing.

        Raises:
            UserError: an unknown key, a value that does not exist here, or lists that do not fit together.
        """
        self._check_fixed()
        widths = self.width_list or [stage.width for stage in named]
        blocks = [self.block_type] * len(widths) if isinstance(self.block_type, str) else self.block_type
        temporal = getattr(self, self.temporal_key)
        lists = {
            "width_list": widths,
            "depth_list": self.depth_list or [stage.depth for stage in named],
            "block_type": blocks or [stage.block for stage in named],
            self.temporal_key: [stage.temporal for stage in named] if temporal is None else temporal,
        }
        if len({len(entries) for entries in lists.values()}) != 1:
            counts = ", ".join(f"{key} {len(entries)}" for key, entries in lists.items())
            raise UserError(f"ae.{self.name}: every list needs one entry per stage; found {counts}")
        stages = tuple(Stage(*entries) for entries in zip(*lists.values()))
        check_stages(stages, f"ae.{self.name}")
        return stages

    def _check_fixed(self) -> None:
        """Other keys of the family may be there, with the one value that they have here."""
        fixed, own = FIXED[self.name], ["width_list", "depth_list", "block_type", self.temporal_key]
        for key, value in self.extra.items():
            where = f"ae.{self.name}.{key}"
            if key not in fixed:
                near = nearest_key(key, own)
                hint = f"did you mean {near!r}?" if near else f"changeable: {', '.join(own)}"
                raise UserError(f"{where} is not known; {hint}")
            if value != fixed[key]:
                raise UserError(f"{where}={value!r} is not possible here; only {fixed[key]!r}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(CoderConfig):
    """Layout of the encoder."""

    name: ClassVar[str] = "encoder"
    temporal_key: ClassVar[str] = "temporal_downsample"

    temporal_downsample: list[bool] | None = opt(None, "per stage, whether frames are halved after it")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(CoderConfig):
    """Layout of the decoder."""

    name: ClassVar[str] = "decoder"
    temporal_key: ClassVar[str] = "temporal_upsample"

    temporal_upsample: list[bool] | None = opt(None, "per stage, whether frames are doubled before it")


def check_stages(stages: tuple[Stage, ...], where: str) -> None:
    """Raise a UserError if stages do not fit together."""
    for stage in stages:
        if stage.depth < 1:
            raise UserError(f"{where}.depth_list={[s.depth for s in stages]}: every stage needs at least one block")
        if stage.width < 1:
            raise UserError(f"{where}.width_list={[s.width for s in stages]}: every stage needs at least one channel")
        if stage.block not in BLOCK_TYPES:
            raise UserError(f"{where}.block_type: {stage.block!r} is not known; use {' or '.join(BLOCK_TYPES)}")
        if stage.block == "EViTS5_GLU" and stage.width % HEAD_DIM:
            raise UserError(
                f"{where}.width_list: {stage.width} channels; attention stages need multiples of {HEAD_DIM}"
            )
    for fine, coarse in pairwise(stages):
        if 4 * fine.width % coarse.width:
            raise UserError(
                f"{where}.width_list: {fine.width} then {coarse.width}; the shortcuts between stages need 4 times the "
                "channels of a stage to be a multiple of the next one's"
            )


class Layout(NamedTuple):
    """Both halves, and the channels of a latent, which divide the last width of both."""

    latent_channels: int
    encoder: tuple[Stage, ...]
    decoder: tuple[Stage, ...]

    def check(self) -> None:
        """Raise a UserError if the halves do not fit together."""
        for name, stages in (("encoder", self.encoder), ("decoder", self.decoder)):
            if self.latent_channels < 1 or stages[-1].width % self.latent_channels:
                raise UserError(
                    f"ae.latent_channels={self.latent_channels} does not divide {stages[-1].width}, the last "
                    f"width of ae.{name}.width_list"
                )
        if [stage.temporal for stage in self.encoder] != [stage.temporal for stage in self.decoder]:
            raise UserError("ae.encoder.temporal_downsample and ae.decoder.temporal_upsample differ: make them equal")
        if self.encoder[-1].temporal:
            raise UserError("ae.encoder.temporal_downsample: the last stage has no resampling: set False there")


def _half(depths: tuple[int, ...]) -> tuple[Stage, ...]:
    widths = (128, 256, 512, 512, 1024, 1024)
    return tuple(
        Stage(width, depth, BLOCK_TYPES[i > 2], i in (3, 4)) for i, (width, depth) in enumerate(zip(widths, depths))
    )


LAYOUTS = MappingProxyType({DEFAULT_LAYOUT: Layout(128, _half((2, 2, 2, 3, 3, 3)), _half((3,) * 6))})


@dataclass(frozen=True, kw_only=True)
class DCAEConfig(ModelOptions):
    """Deep-compression video autoencoder (`dc_ae`).

    Without ``from_pretrained`` the weights released for the layout come from the hub, unless it is changed here, or
    built ``from_scratch``.

    Raises:
        UserError: an unknown layout, or parts that do not fit together.
    """

    key_prefix: ClassVar[str] = "ae."

    model_name: str = opt(DEFAULT_LAYOUT, "named layout")
    from_scratch: bool = opt(False, "build the layout instead of fetching it from the hub")
    strict_load: bool = opt(True, "refuse weights with missing or unexpected keys")
    is_training: bool = opt(False, "encode whole batches without scaling")
    use_spatial_tiling: bool = opt(False, "encode and decode in spatial tiles")
    use_temporal_tiling: bool = opt(False, "encode and decode in temporal tiles")
    spatial_tile_size: int = opt(256, "side of a spatial tile", "px", least=1)
    temporal_tile_size: int = opt(32, "length of a temporal tile", "frames", least=1)
    tile_overlap_factor: float = opt(0.25, "share of a tile that overlaps the next", least=0, below=1)
    scaling_factor: float | None = opt(None, "latents are divided by it")
    disc_off_grad_ckpt: bool = opt(False, "do not recompute the last layer (adaptive GAN weight needs it)")
    latent_channels: int | None = opt(None, "channels of the latent, if other than the layout's")
    encoder: EncoderConfig | None = section(EncoderConfig, "changes to the encoder's layout", open=True)
    decoder: DecoderConfig | None = section(DecoderConfig, "changes to the decoder's layout", open=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layout.check()
        if self.scaling_factor == 0:
            raise UserError("ae.scaling_factor=0: latents cannot be divided by it; leave it out for no scaling")
        self.tiling()  # refuses sizes that cannot be tiled
        if self.use_temporal_tiling and self.temporal_tile_size < 2 * self.compression[0]:
            raise UserError(
                f"ae.temporal_tile_size={self.temporal_tile_size}: a tile of one latent frame would decode to a single "
                f"frame; give {2 * self.compression[0]} or more"
            )

    @cached_property
    def layout(self) -> Layout:
        """The named layout with the changes of ``latent_channels``, ``encoder`` and ``decoder``."""
        named = self._named
        return Layout(
            named.latent_channels if self.latent_channels is None else self.latent_channels,
            (self.encoder or EncoderConfig()).stages(named.encoder),
            (self.decoder or DecoderConfig()).stages(named.decoder),
        )

    @property
    def is_released(self) -> bool:
        """Whether weights of this layout were released, and are wanted."""
        return not self.from_scratch and self.layout == self._named

    @property
    def _named(self) -> Layout:
        if self.model_name not in LAYOUTS:
            raise UserError(f"ae.model_name={self.model_name!r} is not a known layout; known: {', '.join(LAYOUTS)}")
        return LAYOUTS[self.model_name]

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""
        space = 2 ** (len(self.layout.encoder) - 1)
        return (2 ** sum(stage.temporal for stage in self.layout.encoder), space, space)

    def tiling(self) -> "Tiling":
        """The tiles these fields ask for."""
        from opensora.models.vae.tiling import Tiling  # needs torch, which reading a config does not

        return Tiling(
            compression=self.compression,
            is_causal=False,
            spatial_tile=self.spatial_tile_size,
            temporal_tile=self.temporal_tile_size,
            overlap=self.tile_overlap_factor,
            use_spatial=self.use_spatial_tiling,
            use_temporal=self.use_temporal_tiling,
        )
