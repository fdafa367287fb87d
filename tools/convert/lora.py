"""LoRA adapters of an MMDiT: converted, merged into weights, extracted from them.

python tools/convert/lora.py convert SOURCE OUT --to peft|diffusers|kohya|comfyui
python tools/convert/lora.py merge WEIGHTS ADAPTER[@STRENGTH] ... OUT.safetensors
python tools/convert/lora.py extract BEFORE AFTER OUT --rank 32
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
from opensora.diffusion.lora_files import CONFIG_NAME, LoraFile, read_lora
from opensora.utils.errors import UserError
from opensora.utils.new_files import check_place
from tools.arguments import Bounded, user_path
from tools.convert.files import FROM_WRITER, FUSED, HALF_SPLIT
from tools.convert.lora_formats import (
    CONFIG_KEY,
    DIFFUSERS,
    DIFFUSERS_KEY,
    FORMATS,
    KOHYA,
    PEFT,
    config_of,
    plain_alphas,
    write_diffusers,
    write_kohya,
    write_peft,
)
from tools.convert.lora_layouts import (
    BLOCKS_KEY,
    Q_K,
    Entry,
    blocks_text,
    entries_of,
    home,
    read_blocks,
    regroup,
    reorder,
    swap_halves,
)
from tools.convert.lora_weights import extract, merge

DROPPED = (*FROM_WRITER, DIFFUSERS_KEY, BLOCKS_KEY, CONFIG_KEY, "use_liger_rope", "fused_qkv")


def convert(args: argparse.Namespace) -> None:
    """Write an adapter in another format or layout, bit for bit what it was.

    Raises:
        UserError: what cannot be told, or not be written exactly.
    """
    kind = FORMATS[args.to]
    check_output(args, kind)
    file = read_lora(args.source)
    entries, theirs = entries_of(file, args.partial)
    entries, half_split = turn(entries, file, theirs, kind, args)
    layout = DIFFUSERS if kind == DIFFUSERS else args.qkv or default_layout(entries, theirs, kind)
    write(entries, file, kind, layout, half_split, args.output)


def default_layout(entries: list[Entry], theirs: bool, kind: str) -> str:
    """The QKV layout to write where none is asked for: fused for Kohya, else as in the source."""
    fused = any(part.endswith(("q_proj", "k_proj")) and len(e.parts) > 1 for e in entries for part in e.parts)
    return "fused" if kind == KOHYA or (fused and not theirs) else "split"


def turn(
    entries: list[Entry], file: LoraFile, theirs: bool, kind: str, args: argparse.Namespace
) -> tuple[list[Entry], bool | None]:
    """Entries in the rotary layout and the order of modulation to write; and that layout, None if it is not known.

    Raises:
        UserError: the layout of the source matters and is not known, or is said wrongly.
    """
    recorded = {"True": True, "False": False}.get(file.metadata.get("use_liger_rope", ""))
    said = None if args.from_rope is None else HALF_SPLIT[args.from_rope]
    now = False if theirs else recorded if recorded is not None else said
    if said is not None and said != now:
        raise UserError(f"{file.path}: its rotary layout is another one, --from-rope {args.from_rope} is wrong")
    wanted = False if kind == DIFFUSERS else now if args.rope is None else HALF_SPLIT[args.rope]
    if kind == DIFFUSERS and args.rope == "half-split":
        raise UserError("--rope half-split: diffusers' Flux has interleaved rotary channels only")
    matters = any(part.endswith(Q_K) for entry in entries for part in entry.parts)
    if now is None and wanted is not None and matters:
        raise UserError(
            f"{file.path} does not record its rotary layout: give --from-rope (interleaved for adapters of FLUX.1 "
            "made with other programs; half-split for those of Open_Sora_v2 and flux1-dev-fused-rope)"
        )
    if now is not None and wanted is not None and wanted != now:
        entries = [reorder(entry, args.head_dim, wanted) for entry in entries]
    if theirs != (kind == DIFFUSERS):
        entries = [swap_halves(entry) for entry in entries]
    return entries, wanted


def write(entries: list[Entry], file: LoraFile, kind: str, layout: str, half_split: bool | None, output: Path) -> None:
    """Write an adapter in a format and a QKV layout, and say so.

    Raises:
        UserError: it cannot be written exactly.
    """
    blocks = read_blocks(file.metadata.get(BLOCKS_KEY))
    rslora = bool(file.config.get("use_rslora"))
    if rslora and (kind == KOHYA or any(home(entry.parts[0], layout)[1] != entry.parts for entry in entries)):
        entries, rslora = plain_alphas(entries, file.path), False
    named, known = regroup(entries, layout, blocks)
    metadata = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    metadata |= {BLOCKS_KEY: blocks_text(known)} if known else {}
    metadata |= {} if half_split is None else {"use_liger_rope": str(half_split)}
    metadata |= {} if layout == DIFFUSERS else {"fused_qkv": str(FUSED[layout])}
    before = original_config(file)
    config = config_of(named, before, rslora, file.path)
    if before and (kind != PEFT or config != before):
        metadata[CONFIG_KEY] = json.dumps(before, sort_keys=True)
    if kind == PEFT:
        write_peft(output, named, config, metadata)
    elif kind == DIFFUSERS:
        write_diffusers(output, named, config, metadata)
    else:
        write_kohya(output, named, metadata)
    ranks = sorted({entry.rank for entry in named.values()})
    rope = "" if half_split is None else f", {next(name for name, half in HALF_SPLIT.items() if half == half_split)}"
    print(f"{output}: {len(named)} modules of rank {', '.join(map(str, ranks))}, {layout}{rope}")


def original_config(file: LoraFile) -> dict[str, Any]:
    """PEFT's config of the adapter that was converted first, as far as it is known."""
    try:
        kept = json.loads(file.metadata.get(CONFIG_KEY, "{}"))
    except ValueError:
        kept = {}
    return kept if isinstance(kept, dict) and kept else dict(file.config)


def check_output(args: argparse.Namespace, kind: str) -> None:
    """Refuse an output that exists, is of another kind or cannot be written.

    Raises:
        UserError: says which, and what to give instead.
    """
    if kind == PEFT and args.output.suffix:
        raise UserError(f"output {args.output}: --to peft writes a folder, name one without a suffix")
    if kind != PEFT and args.output.suffix != ".safetensors":
        raise UserError(f"output {args.output}: name a file that ends in .safetensors")
    if args.output.exists() and args.output.is_dir() != (kind == PEFT):
        raise UserError(f"output {args.output} is a {'folder' if args.output.is_dir() else 'file'}; give another name")
    check_place(args.output, "output", folder=kind == PEFT)
    there = args.output / CONFIG_NAME if kind == PEFT else args.output
    if there.exists() and not args.overwrite:
        raise UserError(f"{there} exists; choose another name or give --overwrite")


def run_merge(args: argparse.Namespace) -> None:
    """Merge adapters into a weight file."""
    if args.dtype is not None:
        torch_dtype(args.dtype)
    check_output(args, "a weight file")
    merge(args.weights, args.adapters, args)


def run_extract(args: argparse.Namespace) -> None:
    """Write the difference of two weight files as an adapter."""
    kind = FORMATS[args.to]
    check_output(args, kind)
    found = extract(args.before, args.after, args)
    layout = DIFFUSERS if kind == DIFFUSERS else args.qkv or default_layout(found.entries, False, kind)
    file = LoraFile(args.output, metadata=found.metadata)
    entries, half_split = turn(found.entries, file, False, kind, args)
    write(entries, file, kind, layout, half_split, args.output)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert", help="another format or layout, exactly")
    one.add_argument("source", type=user_path, help="adapter: PEFT's folder, or a file of any trainer")
    one.add_argument("output", type=user_path, help="folder (peft) or safetensors file to write; must not exist")
    one.add_argument("--to", choices=FORMATS, required=True, help="format to write; comfyui and kohya are the same")
    one.add_argument("--partial", action="store_true", help="leave out what is not a change of an MMDiT's module")
    _layouts(one)
    one.set_defaults(run=convert)
    two = commands.add_parser("merge", help="adapters into a weight file")
    two.add_argument("weights", type=user_path, help="MMDiT that the adapters are for")
    two.add_argument("adapters", nargs="+", metavar="adapter", help="PATH or PATH@STRENGTH (default: 1)")
    two.add_argument("output", type=user_path, help="safetensors file to write; must not exist")
    two.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as in the source)")
    two.add_argument("--from-rope", choices=HALF_SPLIT, help="rotary layout of weights that do not record it")
    two.add_argument("--partial", action="store_true", help="use what fits of an adapter that fits in part")
    two.set_defaults(run=run_merge)
    three = commands.add_parser("extract", help="an adapter from the difference of two weight files")
    three.add_argument("before", type=user_path, help="MMDiT without the change")
    three.add_argument("after", type=user_path, help="MMDiT with it, in the same layout")
    three.add_argument("output", type=user_path, help="folder (peft) or safetensors file to write; must not exist")
    three.add_argument("--rank", type=int, action=Bounded, least=1, default=32, help="default: %(default)s")
    three.add_argument("--to", choices=FORMATS, default=PEFT, help="format to write (default: %(default)s)")
    three.add_argument("--dtype", help="fp32, bf16 or fp16 (default: that of AFTER)")
    three.add_argument("--device", default="cpu", help="where to compute: cpu or cuda (default: %(default)s)")
    _layouts(three)
    three.set_defaults(run=run_extract)
    for command in (one, two, three):
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
    return whole


def _layouts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--qkv", choices=FUSED, help="QKV layout to write (default: the source's, for kohya fused)")
    command.add_argument("--rope", choices=HALF_SPLIT, help="rotary layout to write (default: the source's)")
    command.add_argument("--from-rope", choices=HALF_SPLIT, help="rotary layout of a source that does not record it")
    command.add_argument(
        "--head-dim", type=int, action=Bounded, least=2, default=128, help="channels per head (default: %(default)s)"
    )


def main(argv: list[str] | None = None) -> None:
    """Read the command line and do it."""
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
