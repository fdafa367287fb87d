"""The video autoencoder: decoding by tiling, encoding, and the bandwidth that its GroupNorm reaches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.vae.group_norm import group_norm, spread_group_norm
from tools.benchmark.cases import vae_input
from tools.benchmark.gpu_parts.bench import GIB, Bench, Row, filled

TILINGS: dict[str, dict[str, Any]] = {
    "spatial tiles (shipped)": {"use_spatial": True},
    "spatial and temporal tiles": {"use_spatial": True, "use_temporal": True},
    "tiles of 256 px, 24 frames": {"use_spatial": True, "use_temporal": True, "temporal_tile": 24},
    "tiles of 128 px, 32 frames": {
        "use_spatial": True, "use_temporal": True, "spatial_tile": 128, "temporal_tile": 32
    },
    "whole": {},
}  # fmt: skip
AT_768 = ("spatial tiles (shipped)", "tiles of 256 px, 24 frames")


def autoencoder(bench: Bench) -> AutoencoderKLCausal3D:
    """The released autoencoder, or a toy."""
    sizes = bench.sizes("256px")
    config = HunyuanVAEConfig(block_out_channels=[*sizes.channels])
    model = filled(lambda: AutoencoderKLCausal3D(config), bench.device, sizes.dtype)
    assert isinstance(model, AutoencoderKLCausal3D)
    return model


@torch.no_grad()
def decode_rows(bench: Bench) -> Iterator[Row]:
    """Decoding in parts, as videos are, by tiling; beside the memory, what was foretold of it."""
    model = autoencoder(bench)
    for resolution in bench.resolutions:
        sizes = bench.sizes(resolution)
        z = vae_input(sizes, bench.device, decode=True)
        for name, keys in TILINGS.items():
            if resolution != "256px" and name not in AT_768:
                continue
            if not bench.has_time(f"decode {resolution}, {name}", 6 if resolution == "256px" else 60):
                continue
            with model.in_tiles(replace(model.tiling, **keys)):
                cost = model.decode_cost(z.shape[2:], sizes.dtype)
                row = bench.measure(partial(_consume, model, z), 2)
            yield {"decode": name, "size": resolution, **row, "counted_gib": cost.peak / GIB if cost else None}
    if bench.has_time("encode", 6):
        x = vae_input(bench.sizes("256px"), bench.device, decode=False)
        with model.in_tiles(replace(model.tiling, use_spatial=True)):
            cost = model.encode_cost(x.shape[2:], x.dtype)
            row = bench.measure(partial(model.encode_stored, x), 2)
        yield {
            "decode": "encoding, spatial tiles",
            "size": "256px",
            **row,
            "counted_gib": cost.peak / GIB if cost else None,
        }


def _consume(model: AutoencoderKLCausal3D, z: torch.Tensor) -> None:
    for part in model.decode_parts(z):
        del part


@torch.no_grad()
def group_norm_rows(bench: Bench) -> Iterator[Row]:
    """GroupNorm of the largest tensor of a tile: bytes read once and written once, by time."""
    sizes = bench.sizes("256px")
    frames, height, width = sizes.video
    channels = sizes.channels[0]
    x = torch.randn(1, channels, frames, height, width, device=bench.device, dtype=sizes.dtype)
    norm = nn.GroupNorm(32, channels, eps=1e-6).to(bench.device, sizes.dtype)
    ways: dict[str, Callable[[], Any]] = {
        "copy": x.clone,
        "torch's GroupNorm": partial(norm, x),
        "ours": partial(spread_group_norm, x, 32, norm.weight, norm.bias, norm.eps),
        "as the autoencoder calls it": partial(group_norm, norm, x),
    }
    for name, run in ways.items():
        row = bench.measure(run)
        if "median_s" in row:
            row["gb_per_s"] = 2 * x.nbytes / row["median_s"] / 1e9
        yield {"group norm": name, "elements": x.numel(), **row}
