"""Layout and options of the deep-compression video autoencoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opensora.config.values import coerce, describe
from opensora.models.dc_ae.blocks import HEAD_DIM
from opensora.models.vae.tiling import Tiling
from opensora.utils.errors import UserError
from opensora.utils.nearest import nearest_key

BLOCK_TYPES = ("ResBlock", "EViTS5_GLU")
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
TEMPORAL = {"encoder": "temporal_downsample", "decoder": "temporal_upsample"}
FIELDS = dict.fromkeys(TEMPORAL.values(), "temporal")  # of `CoderConfig`, where they are not called like the key


@dataclass(frozen=True)
class CoderConfig:
    """Layout of an encoder or decoder; lists have one entry per stage, finest first.

    Args:
        width_list: channels.
        depth_list: blocks.
        block_type: "ResBlock" (convolutions) or "EViTS5_GLU" (linear attention and gated convolution).
        temporal: whether frames are halved (encoder: after the stage) or doubled (decoder: before it).
    """

    width_list: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    depth_list: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    block_type: tuple[str, ...] = (*("ResBlock",) * 3, *("EViTS5_GLU",) * 3)
    temporal: tuple[bool, ...] = (False, False, False, True, True, False)

    def check(self, name: str) -> None:
        """See that the lists fit together; ``name`` ("encoder", "decoder") is for the message.

        Raises:
            UserError: they do not.
        """
        where = f"ae.{name}"
        lengths = {
            "width_list": len(self.width_list),
            "depth_list": len(self.depth_list),
            "block_type": len(self.block_type),
            TEMPORAL[name]: len(self.temporal),
        }
        if len(set(lengths.values())) != 1:
            counts = ", ".join(f"{key} {count}" for key, count in lengths.items())
            raise UserError(f"{where}: every list needs one entry per stage; found {counts}")
        if min(self.depth_list, default=0) < 1:
            raise UserError(f"{where}.depth_list={[*self.depth_list]}: every stage needs at least one block")
        if min(self.width_list) < 1:
            raise UserError(f"{where}.width_list={[*self.width_list]}: every stage needs at least one channel")
        for width, block in zip(self.width_list, self.block_type):
            if block not in BLOCK_TYPES:
                raise UserError(f"{where}.block_type: {block!r} is not known; use {' or '.join(BLOCK_TYPES)}")
            if block == "EViTS5_GLU" and width % HEAD_DIM:
                raise UserError(f"{where}.width_list: {width} channels; attention stages need multiples of {HEAD_DIM}")
        for fine, coarse in zip(self.width_list, self.width_list[1:]):
            if 4 * fine % coarse:
                raise UserError(
                    f"{where}.width_list: {fine} then {coarse}; the shortcuts between stages need 4 times the "
                    "channels of a stage to be a multiple of the next one's"
                )


@dataclass(frozen=True)
class DCAEConfig:
    """Layout, tiling and scaling; the defaults are those of dc-ae-f32t4c128.

    Args:
        latent_channels: channels of a latent; must divide the last width of encoder and decoder.
        encoder, decoder: their layouts.
        scaling_factor: latents are divided by it when encoding and multiplied when decoding; None for 1.
        is_training: for training the autoencoder itself: whole batches at a time, no scaling.
        use_spatial_tiling, use_temporal_tiling: work in tiles where a frame is larger, a video longer than one.
        spatial_tile_size: side of a tile, in pixels.
        temporal_tile_size: length of a tile, in frames.
        tile_overlap_factor: share of a tile that overlaps the next one.
        disc_off_grad_ckpt: never recompute the decoder's last layers in the backward pass.
    """

    latent_channels: int = 128
    encoder: CoderConfig = CoderConfig()
    decoder: CoderConfig = field(default_factory=lambda: CoderConfig(depth_list=(3,) * 6))
    scaling_factor: float | None = None
    is_training: bool = False
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256
    temporal_tile_size: int = 32
    tile_overlap_factor: float = 0.25
    disc_off_grad_ckpt: bool = False

    def __post_init__(self) -> None:
        for name, coder in (("encoder", self.encoder), ("decoder", self.decoder)):
            coder.check(name)
            if self.latent_channels < 1 or coder.width_list[-1] % self.latent_channels:
                raise UserError(
                    f"ae.latent_channels={self.latent_channels} does not divide {coder.width_list[-1]}, the last "
                    f"width of ae.{name}.width_list"
                )
        if self.encoder.temporal != self.decoder.temporal:
            raise UserError("ae.encoder.temporal_downsample and ae.decoder.temporal_upsample differ: make them equal")
        if self.encoder.temporal[-1]:
            raise UserError("ae.encoder.temporal_downsample: the last stage has no resampling: set False there")
        if self.scaling_factor == 0:
            raise UserError("ae.scaling_factor=0: latents cannot be divided by it; leave it out for no scaling")
        self.tiling()  # refuses sizes that cannot be tiled
        if self.use_temporal_tiling and self.temporal_tile_size < 2 * self.compression[0]:
            raise UserError(
                f"ae.temporal_tile_size={self.temporal_tile_size}: a tile of one latent frame would decode to a single "
                f"frame; give {2 * self.compression[0]} or more"
            )

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""
        space = 2 ** (len(self.encoder.width_list) - 1)
        return (2 ** sum(self.encoder.temporal), space, space)

    def tiling(self) -> Tiling:
        """The tiles these fields ask for."""
        return Tiling(
            compression=self.compression,
            is_causal=False,
            spatial_tile=self.spatial_tile_size,
            temporal_tile=self.temporal_tile_size,
            overlap=self.tile_overlap_factor,
            use_spatial=self.use_spatial_tiling,
            use_temporal=self.use_temporal_tiling,
        )


LAYOUTS = {"dc-ae-f32t4c128": DCAEConfig()}


def named_layout(model_name: str) -> DCAEConfig:
    """Layout by name.

    Raises:
        UserError: no layout of that name.
    """
    if model_name not in LAYOUTS:
        raise UserError(f"ae.model_name={model_name!r} is not a known layout; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[model_name]


def override_coder(coder: CoderConfig, name: str, changes: Mapping[str, Any] | None) -> CoderConfig:
    """The layout with the changes of a config section; keys that are None change nothing.

    Args:
        coder: layout to start from.
        name: "encoder" or "decoder".
        changes: ``width_list``, ``depth_list``, ``block_type`` (a list, or one name for all stages) and
            ``temporal_downsample`` / ``temporal_upsample``. Other keys of the family may be there with the one value
            they have here.

    Raises:
        UserError: unknown key, or a value that does not exist here.
    """
    hints = {"width_list": list[int], "depth_list": list[int], "block_type": list[str], TEMPORAL[name]: list[bool]}
    values: dict[str, tuple] = {}
    for key, value in (changes or {}).items():
        where = f"ae.{name}.{key}"
        if key in hints:
            if value is not None:
                stages = (changes or {}).get("width_list") or coder.width_list
                every = [value] * len(stages) if key == "block_type" and isinstance(value, str) else value
                values[FIELDS.get(key, key)] = _stages(where, every, hints[key])
        elif key not in FIXED[name]:
            near = nearest_key(key, hints)
            hint = f"did you mean {near!r}?" if near else f"changeable: {', '.join(hints)}"
            raise UserError(f"{where} is not known; {hint}")
        elif value != FIXED[name][key]:
            raise UserError(f"{where}={value!r} is not possible here; only {FIXED[name][key]!r}")
    return replace(coder, **values)


def _stages(where: str, value: Any, hint: Any) -> tuple:
    try:
        return tuple(coerce(value, hint))
    except ValueError:
        raise UserError(f"{where}={value!r}: give one entry per stage, a {describe(hint)}") from None
