"""The training table of a finished run: ``python tools/data/export.py OUTPUT [--out train.csv] [--tier NAME]``."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from tools.arguments import Converted, names_of, user_path
from tools.data.engine.own_files import OwnFiles
from tools.data.engine.pipeline import TABLE_FILE, is_active, read_result
from tools.data.engine.tables import check_format, fill_table
from tools.outputs import add_overwrite, check_no_input, check_place, write_new

TRAIN_COLUMNS = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
EXTRA_COLUMNS = ("score_vmafmotion", "aesthetic", "match", "camera_motion", "tier")
TRAIN_FILE = "train.csv"


def training_table(table: pl.DataFrame, tier: str | None = None, columns: Sequence[str] = ()) -> pl.DataFrame:
    """Rows that are in, with the columns of ``scripts/cnv/meta.py`` and the scores that are there.

    Args:
        table: of a run; ``clip_path`` becomes ``path``, relative to the output folder.
        tier: only clips of this tier.
        columns: further ones to keep.

    Raises:
        UserError: no clips in the table, an unknown tier or column.
    """
    if "clip_path" not in table.columns:
        raise UserError("the run made no clips: its stages lack cut (or whole)")
    table = table.filter(is_active())
    if tier is not None:
        known = table["tier"].unique().drop_nulls().to_list() if "tier" in table.columns else []
        if tier not in known:
            raise UserError(f"--tier {tier}: no clip has it; there are {', '.join(sorted(known)) or 'none'}")
        table = table.filter(pl.col("tier") == tier)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"--columns {missing[0]}: the table has {', '.join(table.columns)}")
    size = pl.col("height").cast(pl.Int64), pl.col("width").cast(pl.Int64)
    table = table.with_columns(
        pl.col("clip_path").alias("path"),
        (size[0] / size[1]).alias("aspect_ratio"),
        (size[0] * size[1]).alias("resolution"),
        pl.col("fps").round(3),
    )
    if "text" in table.columns:
        table = table.filter(pl.col("text").is_not_null() & (pl.col("text") != ""))
    wanted = dict.fromkeys((*TRAIN_COLUMNS, *EXTRA_COLUMNS, *columns))
    return table.select([column for column in wanted if column in table.columns])


def count_uncaptioned(table: pl.DataFrame) -> int:
    """Clips that are in, but lack the caption that others have."""
    if "text" not in table.columns:
        return 0
    return table.filter(is_active() & (pl.col("text").is_null() | (pl.col("text") == ""))).height


def export(
    root: Path,
    out: Path | None = None,
    tier: str | None = None,
    columns: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[Path, int]:
    """Write the training table as CSV or parquet.

    Args:
        root: output folder of a run.
        out: file to write; none takes ``ROOT/train.csv``. Paths in the table are relative to ``root`` if it lies there,
            else absolute.
        tier: only clips of this tier.
        columns: further ones to keep.
        overwrite: replace a file that is there and no training table of this run.

    Returns:
        The file, and how many clips are in it.

    Raises:
        UserError: as in :func:`training_table`, or there is no place for the file.
    """
    out = out or root / TRAIN_FILE
    check_format(out)
    check_place(out, "--out")
    check_no_input(out, [root / TABLE_FILE])
    table = training_table(read_result(root), tier, columns)
    here = Path(os.path.realpath(root))
    if os.path.realpath(out.parent) == str(here):
        OwnFiles(root, overwrite).write(out.name, partial(fill_table, table))
    else:
        table = table.with_columns(pl.Series("path", [str(here / path) for path in table["path"]], pl.String))
        write_new(out, partial(fill_table, table), overwrite)
    return out, table.height


def main(argv: list[str] | None = None) -> None:
    """Write the table and say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=user_path, help="folder of a run of tools/data/run.py")
    parser.add_argument("--out", type=user_path, help=f".csv or .parquet (default: OUTPUT/{TRAIN_FILE})")
    parser.add_argument("--tier", help="only clips of this tier")
    parser.add_argument(
        "--columns", action=Converted, convert=names_of, default=(), metavar="A,B", help="further columns"
    )
    add_overwrite(parser)
    args = parser.parse_args(argv)
    out, count = export(args.output, args.out, args.tier, args.columns, args.overwrite)
    print(f"{count} clips: {out}")


if __name__ == "__main__":
    run_main(main)
