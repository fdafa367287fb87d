"""Quantised weights of an MMDiT or a T5 encoder: ``python tools/convert/quantize.py SOURCE OUT int8``.

Of an MMDiT a safetensors file is written, of T5's folder a folder. They are loaded without naming ``quantize``, and as
if the source had been quantised while loading. A tensor is read at a time.
"""

import argparse
import sys
from collections.abc import Iterable
from operator import methodcaller
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.acceleration.devices import torch_dtype
from opensora.config import run_main
from opensora.config.choices import QUANTIZERS
from opensora.models.inspect import inspect
from opensora.models.mmdit import loading as mmdit
from opensora.models.quantization.kinds import METADATA
from opensora.models.quantization.loading import Quantization, quantize_tensors
from opensora.models.text import files as text
from opensora.models.text.files import check_encoder, encoder_kind
from opensora.models.text.quantized import stored_weights
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from opensora.utils.new_files import check_place
from opensora.utils.weights import WEIGHT_SUFFIXES, WeightFiles, open_weights
from opensora.utils.weights_writing import save_safetensors
from tools.arguments import user_path
from tools.convert.files import check_output, check_plain, finite_tensors, recorded

T5_FILE = "model.safetensors"


def main(argv: list[str] | None = None) -> None:
    """Read the command line, quantise and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=user_path, help="weights of an MMDiT, or folder of a T5 encoder")
    parser.add_argument("output", type=user_path, help="safetensors file, or folder for T5, to write; must not exist")
    parser.add_argument("kind", help=", ".join(QUANTIZERS))
    parser.add_argument("--dtype", default="bf16", help="of all other weights: fp32, bf16 or fp16 (default: bf16)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    QUANTIZERS.get(args.kind).check(f"kind {args.kind}")
    torch_dtype(args.dtype)
    held = inspect(args.source)
    if held.model_type == "flux":
        check_output(args)
        write(open_weights(args.source), args.output, mmdit.quantization(), args)
    elif held.model_type == "text_embedder" and encoder_kind(str(args.source)) == "t5":
        write_t5(args)
    else:
        raise UserError(f"source {args.source} is {held.what}; an MMDiT or the folder of a T5 encoder can be quantised")


def write_t5(args: argparse.Namespace) -> None:
    """Write a folder like the source's, with quantised weights.

    Raises:
        UserError: the source is incomplete, or the folder is there.
    """
    check_encoder("t5", str(args.source))
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; choose another name or give --overwrite")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"output {args.output} is a file; name a folder")
    if args.output.resolve() == args.source.resolve():
        raise UserError(f"output {args.output} is the source; name another folder")
    check_place(args.output, "output", folder=True)
    with claimed(args.output, advice="choose another name, or wait for it"):
        _write_folder(args)


def _write_folder(args: argparse.Namespace) -> None:
    for file in sorted(args.source.iterdir()):
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
            content = file.read_bytes()
            write_beside(args.output / file.name, methodcaller("write_bytes", content))
    weights = stored_weights(args.source)
    decoder = [key for key in weights.shapes if key.startswith(("decoder.", "lm_head."))]
    write(weights, args.output / T5_FILE, text.quantization(), args, decoder)


def write(
    weights: WeightFiles, output: Path, rule: Quantization, args: argparse.Namespace, skip: Iterable[str] = ()
) -> None:
    """Quantise what a rule covers, and write it with all else.

    Raises:
        UserError: weights that are quantised already, or not finite.
    """
    check_plain(weights)
    quantizer = QUANTIZERS.get(args.kind)()
    tensors = finite_tensors(weights, torch_dtype(args.dtype), skip)
    state = dict(quantize_tensors(tensors, rule.covers, quantizer))
    save_safetensors(state, output, {**recorded(weights), METADATA: args.kind})
    size = sum(tensor.nbytes for tensor in state.values())
    print(f"{output}: {len(state)} tensors, {size / 2**30:.2f} GiB, {args.kind}")


if __name__ == "__main__":
    run_main(main)
