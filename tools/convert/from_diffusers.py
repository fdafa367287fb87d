"""A Flux transformer or an autoencoder of diffusers: ``python tools/convert/from_diffusers.py SOURCE OUT.safetensors``.

Transformers are by default written as FLUX.1 releases them: fused QKV projections, interleaved rotary channels. Of
autoencoders ``AutoencoderKL`` (FLUX.1's) and ``AutoencoderKLHunyuanVideo`` are known.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.diffusion.saving import PIPELINE_CLASS
from opensora.utils.errors import UserError
from opensora.utils.paths import read_text
from opensora.utils.weights import WeightFiles, open_weights
from opensora.utils.weights_writing import save_safetensors
from tools.convert.autoencoders import THEIR_IMAGE_KEY, VIDEO_KEY, image_config, image_from_diffusers, video_config
from tools.convert.files import FUSED, HALF_SPLIT, add_output, check_output, naming, read, recorded, write_mmdit
from tools.convert.layouts import convert_layout, from_diffusers

PARTS = ("transformer", "vae")  # where a pipeline keeps them


def find(source: str, part: str | None) -> Path:
    """The folder of a pipeline's part, or the source itself.

    Raises:
        UserError: it is no folder of a pipeline that has the part.
    """
    if PIPELINE_CLASS in _description(Path(source), "model_index.json").get("_class_name", ()):
        raise UserError(f"source {source} is a pipeline of opensora: give the folder itself to its commands")
    for name in (part,) if part else PARTS[:1]:
        if (Path(source) / name).is_dir():
            return Path(source) / name
    if part and Path(source).name != part:
        raise UserError(f"source {source} has no folder {part}")
    return Path(source)


def autoencoder(weights: WeightFiles, args: argparse.Namespace) -> str:
    """Write an autoencoder, and return how it is loaded.

    Raises:
        UserError: flags that are not for autoencoders, or weights of another one.
    """
    if (args.qkv, args.rope) != (None, None):
        raise UserError(f"{args.source} is an autoencoder: --qkv and --rope are for transformers")
    is_video = VIDEO_KEY in weights.shapes
    described = _description(weights.path)
    with naming(args.source):
        state = read(weights, args.dtype)
        state = state if is_video else image_from_diffusers(state)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        read_config = video_config if is_video else image_config
        read_config(shapes, norm_num_groups=int(described.get("norm_num_groups", 32)))
    save_safetensors(state, args.output, recorded(weights))
    keys = {"scaling_factor": "ae.scale_factor", "shift_factor": "ae.shift_factor"}
    scales = [f"{ours}={described[theirs]}" for theirs, ours in keys.items() if described.get(theirs) is not None]
    kind = "hunyuan_vae" if is_video else "autoencoder_2d"
    return f"{len(state)} tensors, load with {', '.join([f'ae.type={kind}', *scales])}"


def _description(place: Path, name: str = "config.json") -> dict[str, Any]:
    """The ``config.json`` beside weights, or in their folder; empty without one."""
    folder = place if place.is_dir() else place.parent
    try:
        found = json.loads(read_text(folder / name))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def transformer(weights: WeightFiles, args: argparse.Namespace) -> str:
    """Write a Flux transformer, and return how it is loaded."""
    half_split = HALF_SPLIT[args.rope or "interleaved"]
    with naming(args.source):
        state = convert_layout(
            from_diffusers(read(weights, args.dtype)),
            fused_qkv=FUSED[args.qkv or "fused"],
            change_to_half_split=True if half_split else None,
        )
    layouts = write_mmdit(state, half_split, args, recorded(weights))
    return f"{len(state)} tensors, load with {layouts}"


def main(argv: list[str] | None = None) -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weight file, folder of shards with an index, or folder of a whole pipeline")
    add_output(parser)
    parser.add_argument("--part", choices=PARTS, help="what of a whole pipeline (default: transformer)")
    parser.add_argument("--qkv", choices=FUSED, help="QKV layout of a transformer (default: fused)")
    parser.add_argument("--rope", choices=HALF_SPLIT, help="rotary layout of a transformer (default: interleaved)")
    args = parser.parse_args(argv)
    check_output(args)
    weights = open_weights(find(args.source, args.part))
    is_autoencoder = bool({VIDEO_KEY, THEIR_IMAGE_KEY} & weights.shapes.keys())
    print(f"{args.output}: {autoencoder(weights, args) if is_autoencoder else transformer(weights, args)}")


if __name__ == "__main__":
    run_main(main)
