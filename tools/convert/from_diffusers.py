"""A Flux transformer of diffusers to our MMDiT: ``python tools/convert/from_diffusers.py SOURCE OUT.safetensors``.

By default written as FLUX.1 releases it: fused QKV projections, interleaved rotary channels.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.weights import open_weights
from tools.convert.files import FUSED, HALF_SPLIT, add_output, check_output, naming, read, recorded, write_mmdit
from tools.convert.layouts import convert_layout, from_diffusers


def main(argv: list[str] | None = None) -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="weight file, folder of shards with an index, or folder of a whole pipeline")
    add_output(parser)
    parser.add_argument("--qkv", choices=FUSED, default="fused", help="QKV layout (default: %(default)s)")
    parser.add_argument(
        "--rope", choices=HALF_SPLIT, default="interleaved", help="rotary layout (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    check_output(args)
    inside = Path(args.source) / "transformer"  # where a pipeline keeps its transformer
    weights = open_weights(inside if inside.is_dir() else args.source)
    half_split = HALF_SPLIT[args.rope]
    with naming(args.source):
        state = convert_layout(
            from_diffusers(read(weights, args.dtype)),
            fused_qkv=FUSED[args.qkv],
            change_to_half_split=True if half_split else None,
        )
    layouts = write_mmdit(state, half_split, args, recorded(weights))
    print(f"{args.output}: {len(state)} tensors, load with {layouts}")


if __name__ == "__main__":
    run_main(main)
