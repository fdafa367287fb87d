"""Speed and memory of both video autoencoders with random weights, whole and in tiles: ``models.py --vae``."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opensora.benchmark.measuring import MIB, in_own_process, peak_of, seconds_of
from opensora.models.autoencoder import Autoencoder
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError

AUTOENCODERS: dict[str, dict[str, Any]] = {
    "causal VAE 4x8x8": dict(type="hunyuan_vae"),
    "video DC-AE 4x32x32": dict(type="dc_ae", from_scratch=True),
}
TILES: dict[str, Any] = dict(use_spatial_tiling=True, use_temporal_tiling=True)


@dataclass(frozen=True)
class VaeSizes:
    """What is run on a kind of device: the released sizes on a GPU, what takes two minutes in all on two CPU cores.

    Args:
        dtype: of weights and pixels.
        sides: height and width of the clips, in pixels.
        frames: length of the clips, at most.
        changes: fields of the autoencoders that differ from the released ones, by their names in `AUTOENCODERS`.
    """

    dtype: torch.dtype
    sides: Sequence[int]
    frames: int
    changes: Mapping[str, dict[str, Any]]


NARROW = {"width_list": [16, 32, 64, 64, 128, 128]}
VAE_SIZES = {
    "cuda": VaeSizes(torch.bfloat16, (256, 512), 33, {}),
    "cpu": VaeSizes(
        torch.float32,
        (128,),
        9,
        {
            "causal VAE 4x8x8": dict(block_out_channels=[32, 64, 128, 128], sample_size=64),
            "video DC-AE 4x32x32": dict(latent_channels=32, encoder=NARROW, decoder=NARROW, spatial_tile_size=64),
        },
    ),
}


def frames_for(model: Autoencoder, frames: int) -> int:
    """Nearest length from below that the autoencoder takes."""
    ratio, fitting = model.compression[0], model.nearest_frames(frames)[0]
    if fitting < 2 * ratio:
        raise UserError(f"--frames {frames}: at least {2 * ratio + 1}")
    return fitting


@dataclass(frozen=True)
class VaeCase:
    """What a row measures: an autoencoder of `AUTOENCODERS`, whole or in tiles, on clips of a side in pixels."""

    name: str
    tiled: bool
    side: int
    decode: bool


def cases(sizes: VaeSizes) -> list[VaeCase]:
    """All rows."""
    return [
        VaeCase(name, tiled, side, decode)
        for name in AUTOENCODERS
        for tiled in (True, False)
        for side in sizes.sides
        for decode in (False, True)
    ]


def measure(run: Callable[[], Tensor], device: torch.device, repeats: int) -> dict[str, Any]:
    """Peak memory of a first run, then the median time of others; or that memory did not suffice."""
    try:
        with peak_of(device) as peak:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        times = [seconds_of(run, device) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {"seconds": times, "median_s": statistics.median(times), "peak_mib": peak[0] / MIB}


@torch.no_grad()
def measure_case(case: VaeCase, device: torch.device, sizes: VaeSizes, repeats: int) -> dict[str, Any]:
    """The row of a case: see `measure`, and frames per second."""
    config = {**AUTOENCODERS[case.name], **sizes.changes.get(case.name, {}), **(TILES if case.tiled else {})}
    model = build_module(config, MODELS, device_map=str(device), torch_dtype=sizes.dtype).eval()
    size = (frames_for(model, sizes.frames), case.side, case.side)
    options: dict[str, Any] = dict(device=device, dtype=sizes.dtype)
    if case.decode:
        run = partial(model.decode, torch.randn(1, model.latent_channels, *model.get_latent_size(size), **options))
    else:
        run = partial(model.encode, torch.rand(1, 3, *size, **options) * 2 - 1, sample_posterior=False)
    row = measure(run, device, repeats)
    if "median_s" in row:
        row["frames_per_s"] = size[0] / row["median_s"]
    direction, how = "decode" if case.decode else "encode", "tiles" if case.tiled else "whole"
    return {"case": f"{case.name}, {direction}, {'x'.join(map(str, size))}, {how}", **row}


def autoencoder_rows(device: torch.device, sizes: VaeSizes, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per autoencoder, side, direction and kind of tiling, each measured in a process of its own."""
    for case in cases(sizes):
        yield in_own_process(measure_case, case, device, sizes, repeats)
