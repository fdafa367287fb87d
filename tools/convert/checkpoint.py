"""A checkpoint or a folder of shards to one file: ``python tools/convert/checkpoint.py CHECKPOINT OUT.safetensors``."""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.training.checkpoint.folder import list_checkpoints
from opensora.utils.errors import UserError
from opensora.utils.weights import is_stored, open_weights
from opensora.utils.weights_writing import save_safetensors
from tools.convert.files import add_output, check_output, read, recorded


def weight_path(checkpoint: Path, ema: bool) -> Path:
    """What to open for a checkpoint folder, an experiment folder (its newest checkpoint) or a folder of shards.

    Raises:
        UserError: averaged weights are asked for where there are none.
    """
    newest = list_checkpoints(checkpoint)[-1:] if checkpoint.is_dir() else []
    folder = newest[0] if newest else checkpoint
    if not ema:
        return folder
    file = folder / "ema.safetensors"
    if not is_stored(file):
        raise UserError(f"--ema: {folder} has no averaged weights ({file.name})")
    return file


def main(argv: list[str] | None = None) -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint folder, experiment folder (its newest one), or shards with an index"
    )
    add_output(parser)
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    args = parser.parse_args(argv)
    check_output(args)
    if not args.checkpoint.exists():
        raise UserError(f"checkpoint {args.checkpoint} does not exist")
    path = weight_path(args.checkpoint, args.ema)
    weights = open_weights(path)
    state = read(weights, args.dtype)
    save_safetensors(state, args.output, recorded(weights))
    print(f"{args.output}: {len(state)} tensors of {path}")


if __name__ == "__main__":
    run_main(main)
