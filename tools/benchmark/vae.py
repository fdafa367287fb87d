"""Speed and memory of the released sizes of both video autoencoders: ``python tools/benchmark/vae.py --device cuda``.

Encodes and decodes a clip of random pixels with random weights (nothing is downloaded), whole and in the tiles that the
shipped configs use. Prints frames per second and peak memory beyond weights and input; ``--out`` writes them as JSON.
On a CPU the released sizes take minutes per clip: give fewer ``--frames``, or a small ``--size``.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.video import write_text
from tools.benchmark.measuring import MIB, peak_of, seconds_of

TILES: dict[str, Any] = dict(use_spatial_tiling=True, use_temporal_tiling=True)
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "causal VAE 4x8x8": dict(type="hunyuan_vae"),
    "video DC-AE 4x32x32": dict(type="dc_ae", from_scratch=True),
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
def autoencoder_rows(
    device: torch.device, dtype: torch.dtype, sizes: list[int], frames: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row per autoencoder, size, direction and kind of tiling."""
    for name, section in AUTOENCODERS.items():
        for tiled in (True, False):
            options = {**section, **(TILES if tiled else {})}
            model = build_module(options, MODELS, device_map=str(device), torch_dtype=dtype).eval()
            length = frames_for(model, frames)
            for size in sizes:
                video = torch.rand(1, 3, length, size, size, device=device, dtype=dtype) * 2 - 1
                z = torch.randn(
                    1, model.latent_channels, *model.get_latent_size(video.shape[2:]), device=device, dtype=dtype
                )
                runs = {
                    "encode": partial(model.encode, video, sample_posterior=False),
                    "decode": partial(model.decode, z),
                }
                for direction, run in runs.items():
                    row = measure(run, device, repeats)
                    if "median_s" in row:
                        row["frames_per_s"] = length / row["median_s"]
                    how = "tiles" if tiled else "whole"
                    yield {"case": f"{name}, {direction}, {length}x{size}x{size}, {how}", **row}
            del model


def autoencoders(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The rows at 256 and 512 px: 33 frames in bf16 on a GPU; on a CPU 9 frames of 64 px in float32, for a look."""
    if device.type == "cuda":
        return list(autoencoder_rows(device, torch.bfloat16, [256, 512], 33, repeats))
    return list(autoencoder_rows(device, torch.float32, [64], 9, repeats))


def show(row: dict[str, Any]) -> str:
    """A row as a line."""
    if "error" in row:
        return f"{row['case']:<52} {row['error']}"
    speed = f"{row['frames_per_s']:8.1f} frames/s {row['median_s']:8.3f} s"
    return f"{row['case']:<52} {speed} {row['peak_mib']:8.0f} MiB peak"


def main(argv: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512], help="sides in px (default: 256 512)")
    parser.add_argument("--frames", type=int, default=33, help="at most so many (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; give --device cpu")
    for flag, value in (("--frames", args.frames), ("--repeats", args.repeats), ("--size", min(args.size))):
        if value < 1:
            raise UserError(f"{flag} {value}: at least 1")
    if any(size % 32 for size in args.size):
        raise UserError(f"--size {' '.join(map(str, args.size))}: multiples of 32")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for row in autoencoder_rows(device, dtype, args.size, args.frames, args.repeats):
        rows.append(row)
        print(show(row), flush=True)
    if args.out:
        write_text(json.dumps(rows, indent=2) + "\n", args.out)


if __name__ == "__main__":
    run_main(main)
