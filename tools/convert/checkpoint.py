"""A training checkpoint folder to one file: ``python tools/convert/checkpoint.py CHECKPOINT OUT.safetensors``."""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors import safe_open

from opensora.config import run_main
from opensora.diffusion.building import torch_dtype
from opensora.training.checkpoint import find_checkpoint, load_weights
from opensora.utils.errors import UserError
from opensora.utils.weights import save_safetensors


def main(argv: list[str] | None = None) -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint folder, or an experiment folder (its newest one)")
    parser.add_argument("output", type=Path, help="file to write; must not exist")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; choose another name or give --overwrite")
    folder = find_checkpoint(args.checkpoint, ".")
    name = "ema" if args.ema else "model"
    dtype = torch_dtype(args.dtype)
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_weights(folder, name).items()}
    source = folder / "ema.safetensors" if args.ema else folder / "model" / "model.safetensors"
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata() or {})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(weights, args.output, metadata)
    print(f"{args.output}: {len(weights)} tensors of {folder} ({name})")


if __name__ == "__main__":
    run_main(main)
