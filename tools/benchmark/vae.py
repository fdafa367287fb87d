"""Speed and memory of both video autoencoders with random weights, whole and in tiles: ``models.py --vae``."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from tools.benchmark.measuring import MIB, peak_of, seconds_of

AUTOENCODERS: dict[str, dict[str, Any]] = {
    "causal VAE 4x8x8": dict(type="hunyuan_vae"),
    "video DC-AE 4x32x32": dict(type="dc_ae", from_scratch=True),
}
TILES: dict[str, Any] = dict(use_spatial_tiling=True, use_temporal_tiling=True)


@dataclass(frozen=True)
class VaeSizes:
    """What is run on a kind of device: the released sizes on a GPU, a fourth of their channels on two CPU cores.

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


NARROW = {"width_list": [32, 64, 128, 128, 256, 256]}
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


def frames_for(model: Any, frames: int) -> int:
    """Nearest length from below that the autoencoder takes: 4k + 1 if it is causal, else 4k."""
    ratio, lead = model.compression[0], int(model.is_causal)
    fitting = (frames - lead) // ratio * ratio + lead
    if fitting < 2 * ratio:
        raise UserError(f"--frames {frames}: at least {2 * ratio + 1}")
    return fitting


def measure(run: Callable[[], Tensor], device: torch.device, repeats: int) -> dict[str, Any]:
    """Peak memory of a first run, then the median time of others; or that memory did not suffice."""
    try:
        with peak_of(device) as peak:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        times = [seconds_of(run, device) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    return {"seconds": times, "median_s": statistics.median(times), "peak_mib": peak[0] / MIB}


@torch.no_grad()
def autoencoder_rows(device: torch.device, sizes: VaeSizes, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per autoencoder, side, direction and kind of tiling."""
    options: dict[str, Any] = dict(device=device, dtype=sizes.dtype)
    for name, released in AUTOENCODERS.items():
        for tiled in (True, False):
            config = {**released, **sizes.changes.get(name, {}), **(TILES if tiled else {})}
            model = build_module(config, MODELS, device_map=str(device), torch_dtype=sizes.dtype).eval()
            length = frames_for(model, sizes.frames)
            for side in sizes.sides:
                video = torch.rand(1, 3, length, side, side, **options) * 2 - 1
                z = torch.randn(1, model.latent_channels, *model.get_latent_size(video.shape[2:]), **options)
                runs = {
                    "encode": partial(model.encode, video, sample_posterior=False),
                    "decode": partial(model.decode, z),
                }
                for direction, run in runs.items():
                    row = measure(run, device, repeats)
                    if "median_s" in row:
                        row["frames_per_s"] = length / row["median_s"]
                    how = "tiles" if tiled else "whole"
                    yield {"case": f"{name}, {direction}, {length}x{side}x{side}, {how}", **row}
            del model
