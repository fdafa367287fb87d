"""Compare two settings on the same prompts and seeds: compiled, quantised, cached or few-step sampling against plain.

    python tools/evaluate/compare.py samples/plain samples/cached --out runs/cached
    python tools/evaluate/compare.py CONFIG "CONFIG --num_steps 10" --prompts prompts.csv --out runs/steps
    python tools/evaluate/vote.py runs/steps

A and B are folders of samples, or configs with overrides, whose samples are made here (and only those that are not
there yet). Differences come with paired bootstrap intervals of 95 %; vote.py asks people which of two is better.
"""

import argparse
import html
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import parse_config, run_main
from opensora.config.commands import InferenceOptions
from opensora.config.options import LpipsOptions
from opensora.datasets.table import fill_table, read_table, require_columns, row_name
from opensora.diffusion.wording import read_seed
from opensora.utils.errors import UserError, shorten
from opensora.utils.files import write_text
from tools.arguments import Bounded, user_path
from tools.evaluate.page import document, picture_data, strip
from tools.evaluate.pairs import Pair, compare, make_pairs, measure_pairs
from tools.evaluate.samples import list_samples
from tools.outputs import add_overwrite, check_new, check_no_input, check_place, write_new

SEED = 42  # of the first prompt of a table that has none; the others count up
PROMPTS = "prompts.csv"  # in the folder of the results
SHOWN = 8  # pairs on the page: those that differ most


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", help="folder of samples, or a config with overrides in quotes")
    parser.add_argument("b", help="the same for what is compared with it")
    parser.add_argument("--out", type=user_path, required=True, help="folder of the results, and of samples made here")
    parser.add_argument("--prompts", type=user_path, help="table of prompts (text, seed, ...) for samples made here")
    parser.add_argument("--samples", type=int, action=Bounded, least=1, most=1000, default=1, help="videos per prompt")
    parser.add_argument("--lpips", type=user_path, help="folder of vgg16.pth and vgg.pth: adds LPIPS between the two")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where LPIPS works")
    add_overwrite(parser)
    return parser


def seeded_table(prompts: Path, samples: int, out: Path) -> Path:
    """The prompts with a seed and a name each, so that both settings make the same videos.

    Raises:
        UserError: no table, no column ``text``, a seed that is none, or the folder is of other prompts.
    """
    table = read_table(prompts, as_text=True)
    require_columns(table, ["text"], prompts)
    rows = []
    for index, row in enumerate(table.to_dict("records")):
        where, text = row_name(prompts, index), str(row.get("seed") or "").strip()
        seed = read_seed(text, where) if text else SEED + index * samples
        rows += [{**row, "seed": seed + k, "name": f"{index:04d}-{k}"} for k in range(samples)]
    path, seeded = out / PROMPTS, pd.DataFrame(rows)
    check_no_input(path, [prompts])
    made = [name for name in ("a", "b") if (out / name).is_dir()]
    if made and path.is_file() and not read_table(path, as_text=True).equals(seeded.astype(str)):
        raise UserError(f"{path} holds other prompts, whose samples are in {shorten(made)}; give another --out")
    return write_new(path, partial(fill_table, seeded), overwrite=True)


def config_of(words: str, side: str, out: Path) -> InferenceOptions:
    """The config of a setting whose samples are made here.

    Raises:
        UserError: anything wrong with the config, or the folder has samples of another setting.
    """
    note, folder = out / f"{side}.txt", out / side
    if note.is_file() and note.read_text("utf-8").strip() != words:
        raise UserError(f"{folder} was made by {note.read_text('utf-8').strip()!r}; give another --out")
    try:
        given = shlex.split(words)
    except ValueError as error:  # a quote that is not closed
        raise UserError(f"{words!r}: not a command line ({error})") from None
    own = {"dataset.data-path": out / PROMPTS, "save-dir": folder, "skip-existing": True, "num-sample": 1}
    return parse_config([*given, *(f"--{key}={value}" for key, value in own.items())], InferenceOptions)


def make_side(cfg: InferenceOptions, words: str, side: str, out: Path) -> None:
    """Make the samples of a setting that are not there.

    Raises:
        UserError: anything wrong with the config.
    """
    from opensora.acceleration.devices import pick_device
    from opensora.generation.run import generate

    write_text(words + "\n", out / f"{side}.txt")
    generate(cfg, pick_device(cfg.device), environment=os.environ)


def folders(args: argparse.Namespace) -> list[Path]:
    """The two folders of samples, made here where they are configs."""
    given = {"a": args.a, "b": args.b}
    if all(Path(words).is_dir() for words in given.values()):
        return [Path(words) for words in given.values()]
    if args.prompts is None:
        wrong = [words for words in given.values() if not Path(words).is_dir()]
        raise UserError(f"{shorten(wrong)}: no folder; a config needs --prompts")
    made = {side: words for side, words in given.items() if not Path(words).is_dir()}
    configs = {side: config_of(words, side, args.out) for side, words in made.items()}  # before anything is written
    seeded_table(args.prompts, args.samples, args.out)
    for side, cfg in configs.items():
        make_side(cfg, made[side], side, args.out)
    return [args.out / side if side in made else Path(words) for side, words in given.items()]


def page(pairs: list[Pair], rows: pd.DataFrame, found: pd.DataFrame, names: tuple[str, str]) -> str:
    """The table, and the pairs that differ most, one above the other."""
    table = found.to_html(index=False, float_format="{:.4g}".format, na_rep="", border=0)
    parts = ["<h1>{}</h1>".format("<br>".join(f"{side}: {html.escape(n)}" for side, n in zip("AB", names))), table]
    parts.append("<h2>Pairs that differ most (A above, B below)</h2>")
    for index in rows["ssim"].sort_values(kind="stable").index[:SHOWN]:
        pair, row = pairs[index], rows.loc[index]
        said = f"SSIM {row['ssim']:.3f}, PSNR {row['psnr']:.1f} dB - {html.escape(pair.prompt)}"
        shown = "".join(f'<img alt="" src="{picture_data(strip(s.read()[0]))}">' for s in (pair.first, pair.second))
        parts.append(f"<figure>{shown}<figcaption>{said}</figcaption></figure>")
    return document("Comparison of two settings", parts)


def main(argv: list[str] | None = None) -> None:
    """Make what is missing, measure, write, print."""
    args = make_parser().parse_args(argv)
    check_place(args.out, "--out", folder=True)
    for name in ("pairs.csv", "comparison.csv", "comparison.html"):
        check_new(args.out / name, args.overwrite, "--out")
    lpips = load_lpips(args.lpips, args.device) if args.lpips else None
    first, second = folders(args)
    pairs, left = make_pairs(list_samples(first), list_samples(second))
    rows = measure_pairs(pairs, lpips, args.device)
    found = compare(rows)
    text = page(pairs, rows, found, (args.a, args.b))
    for name, write in (
        ("pairs.csv", partial(fill_table, rows)),
        ("comparison.csv", partial(fill_table, found)),
        ("comparison.html", lambda path: path.write_text(text, encoding="utf-8")),
    ):
        write_new(args.out / name, write, args.overwrite)
    print(found.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep=""))
    if left:
        print(f"{len(left)} without their like in the other folder: {shorten(left)}")
    print(args.out / "comparison.html")


def load_lpips(folder: Path, device: str) -> Any:
    """The network of LPIPS.

    Raises:
        UserError: a file is missing; says how to get it.
    """
    from opensora.acceleration.devices import pick_device
    from opensora.models.vae.lpips import build_lpips, check_lpips

    options = LpipsOptions(backbone=str(folder / "vgg16.pth"), heads=str(folder / "vgg.pth"))
    check_lpips(options)
    return build_lpips(options, pick_device(device))


if __name__ == "__main__":
    run_main(main)
