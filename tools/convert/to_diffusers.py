"""Weights as a folder of diffusers: ``python tools/convert/to_diffusers.py SOURCE OUT_FOLDER``.

An image model without conditions on videos becomes a ``FluxTransformer2DModel``, its autoencoder an ``AutoencoderKL``,
the causal video autoencoder an ``AutoencoderKLHunyuanVideo``; ``from_pretrained(OUT_FOLDER)`` loads them. With
``--pipeline`` SOURCE is a config, and all of its models become the folder of a pipeline, which
``DiffusionPipeline.from_pretrained(OUT_FOLDER, trust_remote_code=True)`` loads where opensora is installed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.acceleration.devices import torch_dtype
from opensora.config import run_main
from opensora.diffusion.saving import check_place
from opensora.utils import new_files
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from opensora.utils.weights import WeightFiles, open_weights
from opensora.utils.weights_writing import save_safetensors
from tools.arguments import Bounded, user_path
from tools.convert.autoencoders import (
    IMAGE_KEY,
    VIDEO_KEY,
    image_config,
    image_description,
    image_to_diffusers,
    video_config,
    video_description,
)
from tools.convert.files import HALF_SPLIT, check_plain, naming, read
from tools.convert.layouts import State, convert_layout, has_fused_qkv, model_config, to_diffusers
from tools.convert.mmdit import current_rope

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
VERSION = "0.30.0"  # of diffusers, the first with all of these classes' keys
AXES = {128: [16, 56, 56]}  # channels of a head -> rotary axes of the released models
FLUX_RATIO = 4.0  # of the MLP, fixed in diffusers
OF_ONE_MODEL = ("from_rope", "axes_dim", "scale_factor", "shift_factor", "norm_groups")


def flux(weights: WeightFiles, args: argparse.Namespace) -> tuple[State, dict[str, Any]]:
    """Weights and config of a ``FluxTransformer2DModel``.

    Raises:
        UserError: a model that has more than Flux, or a layout that is not known.
    """
    has_fused_qkv(weights.shapes)
    config = model_config(weights.shapes)
    if config.cond_embed or config.guidance_img_embed:
        raise UserError("it is a video model: diffusers' Flux has no embedder of conditions (cond_in)")
    half_split = current_rope(weights, args.from_rope)
    if half_split is None:
        raise UserError(
            "its rotary layout is not recorded: give --from-rope (flux1-dev is interleaved, flux1-dev-fused-rope is "
            "half-split)"
        )
    if config.mlp_hidden != FLUX_RATIO * config.hidden_size or not config.qkv_bias:
        raise UserError("diffusers' Flux has an MLP of four times the width, and biases of queries, keys and values")
    axes = args.axes_dim or AXES.get(config.head_dim)
    if axes is None or sum(axes) != config.head_dim:
        raise UserError(f"heads of {config.head_dim} channels: give --axes-dim, three numbers with that sum")
    state = convert_layout(
        read(weights, args.dtype), fused_qkv=False, change_to_half_split=False if half_split else None
    )
    return to_diffusers(state), {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": axes,
    }


def convert(weights: WeightFiles, args: argparse.Namespace) -> tuple[State, dict[str, Any]]:
    """Weights and config of whichever model it is.

    Raises:
        UserError: a model that diffusers does not have.
    """
    scales = {key: value for key in ("scale_factor", "shift_factor") if (value := getattr(args, key)) is not None}
    groups = args.norm_groups or 32
    if IMAGE_KEY in weights.shapes:
        image = image_config(weights.shapes, norm_num_groups=groups, **scales)
        return image_to_diffusers(read(weights, args.dtype)), image_description(image)
    if VIDEO_KEY in weights.shapes:
        video = video_config(weights.shapes, norm_num_groups=groups, **scales)
        return read(weights, args.dtype), video_description(video)
    return flux(weights, args)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that has a model.

    Raises:
        UserError: says which.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file; name a folder")
    new_files.check_place(folder, "output", folder=True)
    there = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder / there[0]} exists; choose another folder or give --overwrite")


def write_pipeline(args: argparse.Namespace) -> None:
    """Write all models of a config as the folder of a pipeline.

    Raises:
        UserError: flags for single models, a config that cannot be loaded, or a folder that has something.
    """
    unused = [flag for flag in OF_ONE_MODEL if getattr(args, flag) is not None]
    if unused:
        raise UserError(f"--{unused[0].replace('_', '-')} is for a single model; the config says it of a pipeline's")
    check_place(args.output, args.overwrite)
    from opensora.diffusion.pipeline import VideoPipeline

    overrides = {} if args.dtype is None else {"dtype": args.dtype}
    pipe = VideoPipeline.from_pretrained(args.source, device="cpu", **overrides)
    pipe.save_pretrained(args.output, license=args.license, overwrite=args.overwrite)
    print(
        f"{args.output}: a pipeline, load with diffusers.DiffusionPipeline.from_pretrained and trust_remote_code=True "
        "where opensora is installed, or give the folder to opensora"
    )


def main(argv: list[str] | None = None) -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        type=user_path,
        help="weight file, or folder (shards with an index, a checkpoint); with --pipeline a config",
    )
    parser.add_argument("output", type=user_path, help="folder to write; must have no model")
    parser.add_argument("--pipeline", action="store_true", help="write all models of a config, named or by its file")
    parser.add_argument("--license", help="of a pipeline's weights, for its model card: apache-2.0, ...")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as in the source)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the folder")
    parser.add_argument("--from-rope", choices=HALF_SPLIT, help="rotary layout of a source that does not record it")
    parser.add_argument("--axes-dim", type=int, nargs=3, help="rotary channels per axis (default: those of FLUX.1)")
    parser.add_argument("--scale-factor", type=float, help="of an autoencoder (default: the released one's)")
    parser.add_argument("--shift-factor", type=float, help="of an image autoencoder (default: the released one's)")
    parser.add_argument(
        "--norm-groups", type=int, action=Bounded, least=1, default=None, help="of an autoencoder (default: 32)"
    )
    args = parser.parse_args(argv)
    if args.dtype is not None:
        torch_dtype(args.dtype)
    if args.pipeline:
        write_pipeline(args)
        return
    if args.license is not None:
        raise UserError("--license is for --pipeline")
    check_folder(args.output, args.overwrite)
    weights = open_weights(args.source)
    check_plain(weights)
    with naming(args.source):
        state, config = convert(weights, args)
    save_safetensors(state, args.output / WEIGHTS)
    text = json.dumps({**config, "_diffusers_version": VERSION}, indent=2, sort_keys=True) + "\n"
    write_beside(args.output / CONFIG, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    print(f"{args.output}: {len(state)} tensors, load with diffusers.{config['_class_name']}.from_pretrained")


if __name__ == "__main__":
    run_main(main)
