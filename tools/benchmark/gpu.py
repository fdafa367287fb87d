"""Everything about one GPU in one call: forwards by variant, pipelines, capped memory, decoding, training steps.

    python tools/benchmark/gpu.py [--quick] [--part forward ...] [--cap 24 --cap 16 --cap 12] [--seconds 480]
                                  [--original DIR] [--out FILE.json] [--write]

Random weights of the released sizes, built on the card; nothing is downloaded. It takes at most ``--seconds`` (480):
every part keeps time for the first rows of those after it, and what there is no time for is left out and named, as is
what fails. ``--part`` measures some parts only. ``--device cpu --toy`` runs all of it with tiny models, to see that it
does. ``--cap 16`` holds runs to what a card of 16 GB leaves to a program (15.5 GiB). ``--original`` is a checkout of
Open-Sora 2.0 whose own model is timed too. ``--out`` is written after each part, ``--write`` puts the tables into
docs/benchmarks.md and the pipelines into docs/hardware.md at the end.
"""

import argparse
import datetime
import json
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.acceleration.devices import pick_device
from opensora.benchmark.measuring import markdown
from opensora.config import run_main
from opensora.diffusion.cards import known_card
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from tools.arguments import Bounded
from tools.benchmark import hardware
from tools.benchmark.gpu_parts.autoencoder import decode_rows, group_norm_rows
from tools.benchmark.gpu_parts.bench import Bench, Row
from tools.benchmark.gpu_parts.forward import forward_rows
from tools.benchmark.gpu_parts.pipelines import Models, capped_rows, pipeline_rows
from tools.benchmark.gpu_parts.training import training_rows
from tools.benchmark.released import TERA, matrix_rate
from tools.outputs import add_overwrite, check_new

PAGE = hardware.ROOT / "docs" / "benchmarks.md"
# parts by name, the most telling first: title of the table, seconds of an H100 kept for its first rows
PARTS: Mapping[str, tuple[str, float]] = {
    "card": ("Card", 5),
    "forward": ("One forward", 40),
    "norm": ("GroupNorm", 3),
    "autoencoder": ("Autoencoder", 12),
    "pipelines": ("Pipelines", 45),
    "capped": ("Held to less memory", 30),
    "training": ("Training steps", 16),
}
BEGIN, END = "<!-- written by tools/benchmark/gpu.py: begin -->", "<!-- written by tools/benchmark/gpu.py: end -->"


def card_rows(bench: Bench) -> Iterator[Row]:
    """What the card itself reaches."""
    size = 64 if bench.toy else 8192
    yield {"card": "matrix product, bf16", "tflops": matrix_rate(bench.device, size) / TERA}
    x = torch.ones(2**12 if bench.toy else 2**30, device=bench.device, dtype=torch.uint8)
    for name, source in (
        ("copy on the card", x.clone()),
        ("from pageable memory", x.cpu()),
        ("from pinned memory", _pinned(x)),
    ):
        row = bench.measure(partial(x.copy_, source, non_blocking=True))
        if "median_s" in row:
            row = {"gb_per_s": x.nbytes * (2 if name == "copy on the card" else 1) / row["median_s"] / 1e9}
        yield {"card": name, **row}


def _pinned(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().pin_memory() if x.is_cuda else x.clone()


def parts(bench: Bench) -> dict[str, Callable[[], Iterable[Row]]]:
    """What measures each of `PARTS`, in their order."""
    models = Models(bench)
    return {
        "card": lambda: card_rows(bench),
        "forward": lambda: forward_rows(bench),
        "norm": lambda: group_norm_rows(bench),
        "autoencoder": lambda: decode_rows(bench),
        "pipelines": lambda: pipeline_rows(bench, models),
        "capped": lambda: capped_rows(bench, models),
        "training": lambda: training_rows(bench),
    }


def chosen(bench: Bench, names: Collection[str]) -> list[str]:
    """Parts to measure, of those that are asked for (all, if none is)."""
    idle = {*(["training"] if bench.quick else []), *([] if bench.caps else ["capped"])}
    return [name for name in PARTS if name in names or not (names or name in idle)]


def measure(
    bench: Bench,
    shown: Callable[[str], None] = print,
    names: Collection[str] = (),
    done: Callable[[Mapping[str, list[Row]]], object] = bool,
) -> dict[str, list[Row]]:
    """Parts of the measurement; one that fails is named, and the others go on.

    Args:
        bench: device and time.
        shown: gets the table of each part as soon as it is there, and in the end what was left out.
        names: of the parts; none: all.
        done: gets all tables by title, after each part.
    """
    found: dict[str, list[Row]] = {}
    rows_of, order = parts(bench), chosen(bench, names)
    for number, name in enumerate(order):
        title = PARTS[name][0]
        rows: list[Row] = []
        found[title] = rows
        bench.reserved = sum(PARTS[later][1] for later in order[number + 1 :])
        _fill(bench, title, rows, rows_of[name])
        if rows:
            shown(f"\n{title} ({bench.left:.0f} s left)\n\n{markdown(rows)}")
        done(found)
    for line in bench.left_out:
        shown(f"left out: {line}")
    return found


def _fill(bench: Bench, title: str, rows: list[Row], make: Callable[[], Iterable[Row]]) -> None:
    """Gather the rows of a part, as many as there are before it fails."""
    try:
        for row in make():
            rows.append(row)
    except torch.OutOfMemoryError:
        bench.left_out.append(f"{title}, after {len(rows)} rows: out of memory")
    except Exception as error:  # of a card or a version that this was not tried on: the other parts may work
        first = (str(error).splitlines() or [""])[0]
        bench.left_out.append(f"{title}, after {len(rows)} rows: {type(error).__name__}: {first}")
        traceback.print_exc()
    bench.clear()


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **({"cudnn": cudnn} if cudnn else {}),
    }


def section(about: Mapping[str, Any], tables: Mapping[str, list[Row]], left_out: Iterable[str]) -> str:
    """The part of docs/benchmarks.md that this program writes."""
    words = ", ".join(f"{key} {value}" for key, value in about.items())
    text = f"{BEGIN}\n\n## One GPU\n\n`python tools/benchmark/gpu.py`: {words}; random weights of the released sizes.\n"
    for title, rows in tables.items():
        text += f"\n### {title}\n\n{markdown(rows)}\n" if rows else ""
    text += "".join(f"\nLeft out: {line}.\n" for line in left_out)
    return f"{text}\n{END}\n"


def written(page: str, part: str) -> str:
    """A page with the part in the place of an earlier one, or at its end."""
    if BEGIN in page and END in page:
        before, rest = page.split(BEGIN, 1)
        return before + part.rstrip("\n") + rest.split(END, 1)[1]
    return f"{page.rstrip()}\n\n{part}"


def as_measured(about: Mapping[str, Any], rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Pipelines as docs/hardware.md has them, of a card that its table knows."""
    card = known_card(str(about["device"]))
    return [
        {
            "card": card.name,
            "case": row["pipeline"].partition(", ")[0],
            "flags": row["pipeline"].partition(", ")[2],
            "peak_gib": round(row["peak_gib"], 1),
            "seconds": round(row["total_s"], 1),
            "of": ", ".join(f"{key.removesuffix('_s')} {row[key]:.1f}" for key in ("text_s", "denoise_s", "decode_s")),
            "software": f"torch {about['torch']}, cuDNN {about.get('cudnn')}",
            "date": about["date"],
        }
        for row in rows
        if card is not None and "total_s" in row
    ]


def write_pages(about: Mapping[str, Any], tables: Mapping[str, list[Row]], left_out: Iterable[str]) -> None:
    """docs/benchmarks.md, measured.json and docs/hardware.md."""
    write_text(written(PAGE.read_text(encoding="utf-8"), section(about, tables, left_out)), PAGE)
    new = as_measured(about, tables.get("Pipelines", []))
    keys = {(row["card"], row["case"], row["flags"]) for row in new}
    kept = [row for row in hardware.measured() if (row["card"], row["case"], row["flags"]) not in keys]
    write_text(json.dumps([*kept, *new], indent=2) + "\n", hardware.MEASURED)
    write_text(hardware.page(), hardware.PAGE)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--quick", action="store_true", help="256px only, no variants of pipelines, no training")
    parser.add_argument(
        "--part", choices=[*PARTS], action="append", default=[], help="what to measure; may be repeated; default: all"
    )
    parser.add_argument(
        "--cap", type=int, action="append", default=[], help="GB of a card to hold runs to; may be repeated"
    )
    parser.add_argument("--original", type=Path, help="checkout of Open-Sora 2.0, whose model is timed too")
    parser.add_argument(
        "--seconds",
        type=float,
        action=Bounded,
        least=0,
        most=10**6,
        default=480,
        help="time for all of it (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and docs/hardware.md")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.out:
        check_new(args.out, args.overwrite)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU; --device cpu --toy runs everything with tiny models")
    if args.device == "cpu" and not args.toy:
        raise UserError("--device cpu: the released sizes take hours on a CPU; add --toy")
    if args.write and args.toy:
        raise UserError("--write: figures of toys are not for the pages")
    if any(cap < 1 for cap in args.cap) or args.seconds <= 0:
        raise UserError("--cap and --seconds must be above 0")
    if args.original is not None and not (args.original / "opensora").is_dir():
        raise UserError(f"--original {args.original}: no checkout of Open-Sora, it has no folder opensora")
    device = pick_device(args.device)
    bench = Bench(device, args.toy, args.quick, args.seconds, tuple(args.cap), args.original)
    about = environment(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    def keep(tables: Mapping[str, list[Row]]) -> None:
        if args.out:
            found = {"environment": about, "left_out": bench.left_out, **tables}
            write_text(json.dumps(found, indent=2) + "\n", args.out)

    tables = measure(bench, names=args.part, done=keep)
    if args.write:
        write_pages(about, tables, bench.left_out)


if __name__ == "__main__":
    run_main(main)
