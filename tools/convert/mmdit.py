"""Layout of an MMDiT's weights: ``python tools/convert/mmdit.py SOURCE OUT.safetensors --qkv fused --rope half-split``.

Changes between fused and split QKV projections, and between interleaved and half-split rotary channels.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.weights import WeightFiles, open_weights
from tools.convert.files import (
    FUSED,
    HALF_SPLIT,
    add_output,
    check_output,
    check_plain,
    naming,
    read,
    recorded,
    write_mmdit,
)
from tools.convert.layouts import convert_layout, has_fused_qkv, model_config


def current_rope(weights: WeightFiles, from_rope: str | None) -> bool | None:
    """Whether the rotary layout of the source is half-split: from its metadata, else ``--from-rope``, else None.

    Raises:
        UserError: the two say different things.
    """
    text = weights.metadata.get("use_liger_rope")
    said = None if from_rope is None else HALF_SPLIT[from_rope]
    if text not in ("True", "False"):
        return said
    if said is not None and str(said) != text:
        raise UserError(
            f"{weights.path} records use_liger_rope={text}, so --from-rope {from_rope} is wrong: leave it out"
        )
    return text == "True"


def main(argv: list[str] | None = None) -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="weight file, or folder (shards with an index, a checkpoint)")
    add_output(parser)
    parser.add_argument("--qkv", choices=FUSED, help="QKV layout to write (default: as in the source)")
    parser.add_argument("--rope", choices=HALF_SPLIT, help="rotary layout to write (default: as in the source)")
    parser.add_argument("--from-rope", choices=HALF_SPLIT, help="rotary layout of a source that does not record it")
    args = parser.parse_args(argv)
    if args.qkv is None and args.rope is None:
        raise UserError("nothing to convert: give --qkv fused|split, --rope interleaved|half-split, or both")
    check_output(args)
    weights = open_weights(args.source)
    check_plain(weights)
    with naming(args.source):
        fused = has_fused_qkv(weights.shapes)
        model_config(weights.shapes)  # a file that is not whole is told at once
    half_split = current_rope(weights, args.from_rope)
    if args.rope is not None and half_split is None:
        raise UserError(
            f"{args.source} does not record its rotary layout, and its tensors do not tell it: give --from-rope "
            f"(flux1-dev is interleaved; Open_Sora_v2 and flux1-dev-fused-rope are half-split)"
        )
    to_fused = fused if args.qkv is None else FUSED[args.qkv]
    to_half_split = half_split if args.rope is None else HALF_SPLIT[args.rope]
    if (to_fused, to_half_split) == (fused, half_split):
        wanted = " ".join(f"--{name} {getattr(args, name)}" for name in ("qkv", "rope") if getattr(args, name))
        raise UserError(f"{args.source} is in that layout already ({wanted}): nothing to convert")
    with naming(args.source):
        state = convert_layout(
            read(weights, args.dtype),
            fused_qkv=to_fused,
            change_to_half_split=to_half_split if to_half_split != half_split else None,
        )
    layouts = write_mmdit(state, to_half_split, args, recorded(weights))
    print(f"{args.output}: {len(state)} tensors, load with {layouts}")


if __name__ == "__main__":
    run_main(main)
