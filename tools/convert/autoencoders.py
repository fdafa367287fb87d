"""Autoencoders under diffusers' names, as pure functions on state dicts.

The causal video autoencoder has the names of ``AutoencoderKLHunyuanVideo`` already; the image autoencoder of FLUX.1
becomes an ``AutoencoderKL`` by other names, levels of the decoder counted from the other end, and projections of its
attention as matrices instead of 1x1 convolutions.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.hunyuan_vae import autoencoder as hunyuan
from opensora.models.kinds import Shapes
from opensora.models.vae import autoencoder_2d as image
from opensora.models.vae.config import AutoEncoder2DConfig
from opensora.utils.errors import UserError, shorten
from tools.convert.layouts import State

IMAGE_KEY, VIDEO_KEY = "encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.conv.weight"
THEIR_IMAGE_KEY = "encoder.down_blocks.0.resnets.0.conv1.weight"
# our name <-> theirs, first match; {level} counts from the other end in the decoder
NAMES = (
    ("encoder.down.{level}.block.", "encoder.down_blocks.{level}.resnets."),
    ("encoder.down.{level}.downsample.", "encoder.down_blocks.{level}.downsamplers.0."),
    ("decoder.up.{level}.block.", "decoder.up_blocks.{level}.resnets."),
    ("decoder.up.{level}.upsample.", "decoder.up_blocks.{level}.upsamplers.0."),
    *(
        (f"{part}.{ours}.", f"{part}.{theirs}.")
        for part in ("encoder", "decoder")
        for ours, theirs in {
            "mid.block_1": "mid_block.resnets.0",
            "mid.block_2": "mid_block.resnets.1",
            "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
            "mid.attn_1.q": "mid_block.attentions.0.to_q",
            "mid.attn_1.k": "mid_block.attentions.0.to_k",
            "mid.attn_1.v": "mid_block.attentions.0.to_v",
            "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
            "norm_out": "conv_norm_out",
            "conv_in": "conv_in",
            "conv_out": "conv_out",
        }.items()
    ),
)
MATRIX = re.compile(r".*\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


def image_to_diffusers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of our image autoencoder -> that of diffusers' ``AutoencoderKL``."""
    renamed = {_renamed(key, state, ours=True): value for key, value in state.items()}
    return {key: value.flatten(1) if MATRIX.fullmatch(key) else value for key, value in renamed.items()}


def image_from_diffusers(state: Mapping[str, torch.Tensor]) -> State:
    """The inverse of :func:`image_to_diffusers`.

    Raises:
        UserError: an autoencoder with more parts, such as those of Stable Diffusion 1 and 2.
    """
    more = [key for key in state if key.startswith(("quant_conv.", "post_quant_conv."))]
    if more:
        raise UserError(f"it has {shorten(more)}, which the image autoencoder of FLUX.1 does not have")
    return {
        _renamed(key, state, ours=False): value[..., None, None] if MATRIX.fullmatch(key) and value.ndim == 2 else value
        for key, value in state.items()
    }


def _renamed(key: str, state: Mapping[str, torch.Tensor], ours: bool) -> str:
    """A key under the other names.

    Raises:
        UserError: neither has it.
    """
    for pair in NAMES:
        before, after = pair if ours else pair[::-1]
        found = re.match(re.escape(before).replace(r"\{level\}", r"(?P<level>\d+)"), key)
        if found is None:
            continue
        rest, level = key[found.end() :], int(found.groupdict().get("level") or 0)
        if key.startswith("decoder."):
            level = _levels(state, ours) - 1 - level
        names = ("nin_shortcut", "conv_shortcut") if ours else ("conv_shortcut", "nin_shortcut")
        return after.format(level=level) + rest.replace(*names)
    raise UserError(f"it has {key}, which an image autoencoder does not have")


def _levels(state: Mapping[str, torch.Tensor], ours: bool) -> int:
    prefix = "decoder.up." if ours else "decoder.up_blocks."
    return len({key.split(".")[2] for key in state if key.startswith(prefix)})


def image_config(shapes: Shapes, **more: Any) -> AutoEncoder2DConfig:
    """Config of the image autoencoder that has these weights, under our names, checked tensor by tensor.

    Raises:
        UserError: it is none, or not a whole one.
    """
    config = AutoEncoder2DConfig(**image.fields_of_shapes(shapes), **more)
    check(lambda: image.AutoEncoder2D(config), shapes, "an image autoencoder")
    return config


def video_config(shapes: Shapes, **more: Any) -> HunyuanVAEConfig:
    """As :func:`image_config`, of the causal video autoencoder."""
    config = HunyuanVAEConfig(**hunyuan.fields_of_shapes(shapes), **more)
    check(lambda: AutoencoderKLCausal3D(config), shapes, "a causal video autoencoder")
    return config


def check(build: Any, shapes: Shapes, what: str) -> None:
    """See that weights are those of a model.

    Raises:
        UserError: names what is missing, too many, or of another shape.
    """
    with torch.device("meta"):
        model: nn.Module = build()
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    odd = sorted(key for key in {*wanted, *shapes} if wanted.get(key) != shapes.get(key))
    if odd:
        raise UserError(
            f"it is not {what}, or not a whole one: {shorten(odd)} are missing, too many or of another shape"
        )


def image_description(config: AutoEncoder2DConfig) -> dict[str, Any]:
    """``config.json`` of an ``AutoencoderKL``.

    Raises:
        UserError: a scale or shift for each channel, which that has no place for.
    """
    if not all(isinstance(value, int | float) for value in (config.scale_factor, config.shift_factor)):
        raise UserError("AutoencoderKL has one scale and one shift for all channels")
    levels = len(config.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "latent_channels": config.z_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": config.resolution,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def video_description(config: HunyuanVAEConfig) -> dict[str, Any]:
    """``config.json`` of an ``AutoencoderKLHunyuanVideo``.

    Raises:
        UserError: a scale for each channel, a shift, or a decoder of other widths, which that has no place for.
    """
    if not isinstance(config.scale_factor, int | float) or config.shift_factor != 0.0:
        raise UserError("AutoencoderKLHunyuanVideo has one scale for all channels and no shift")
    if config.decoder_channels != config.block_out_channels:
        raise UserError(
            f"AutoencoderKLHunyuanVideo has equal widths on both sides; this decoder has {config.decoder_channels}, "
            f"its encoder {config.block_out_channels}"
        )
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scale_factor,
        "spatial_compression_ratio": config.spatial_compression_ratio,
        "temporal_compression_ratio": config.time_compression_ratio,
    }
