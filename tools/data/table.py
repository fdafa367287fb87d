"""Operations on tables of any size: ``python tools/data/table.py IN... --out OUT [operations]``.

Inputs are CSV or parquet files (or patterns) and are put one below the other. Operations happen in the order in which
they are listed by ``--help``, whatever their order on the command line.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError, first_line
from tools.arguments import Bounded, Converted, names_of, user_path
from tools.data.engine.tables import check_format, fill_table, read_table
from tools.outputs import add_overwrite, check_no_input, check_place, write_new


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that patterns name; a pattern that fits none stands for itself."""
    found = []
    for pattern in patterns:
        path = user_path(pattern)
        fitting = sorted(path.parent.glob(path.name)) if path.name and not path.is_file() else []
        found += fitting or [path]
    return found


def read_all(files: Sequence[Path]) -> pl.DataFrame:
    """All files, one below the other; columns that one lacks are empty there.

    Raises:
        UserError: a file is no table, or the same column holds other types.
    """
    tables = [read_table(file) for file in files]
    try:
        return pl.concat(tables, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the tables do not fit together: {first_line(error)}") from error


def need(table: pl.DataFrame, columns: Sequence[str], flag: str) -> None:
    """Raise a UserError for columns that a table lacks."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"{flag} {missing[0]}: no such column; there are {', '.join(table.columns)}")


def first_of_each(table: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """The first row of those that are equal in some columns; in half the time of ``unique`` with its order kept."""
    return table.filter(pl.struct(columns).is_first_distinct())


def join(table: pl.DataFrame, other: pl.DataFrame, on: str, how: str, flag: str) -> pl.DataFrame:
    """``left`` (add columns), ``anti`` (subtract) or ``inner`` (intersect), by one column; order and rows of the first.

    Columns that both have keep the first table's values where it has any.
    """
    need(table, [on], "--on")
    need(other, [on], f"{flag}: column")
    other = other.select(on) if how == "anti" else first_of_each(other, [on])
    kind: Any = how
    try:
        joined = table.join(other, on=on, how=kind, suffix="_other", maintain_order="left")
    except pl.exceptions.SchemaError:
        kinds = f"{table[on].dtype} in one table and {other[on].dtype} in the other"
        raise UserError(f"{flag}: column '{on}' is {kinds}; --on names the column to join by") from None
    both = [name for name in other.columns if name != on and name in table.columns]
    return joined.with_columns(pl.coalesce(name, f"{name}_other").alias(name) for name in both).drop(
        f"{n}_other" for n in both
    )


def where(table: pl.DataFrame, condition: str) -> pl.DataFrame:
    """Rows that meet a condition in SQL (``fps >= 16 AND num_frames > 48``).

    Raises:
        UserError: the condition cannot be understood.
    """
    try:
        return pl.SQLContext(t=table).execute(f"SELECT * FROM t WHERE {condition}", eager=True)
    except (Exception, pl.exceptions.PanicException) as error:
        raise UserError(f"--where {condition!r}: {first_line(error)}; columns: {', '.join(table.columns)}") from error


def transform(table: pl.DataFrame, args: argparse.Namespace) -> pl.DataFrame:
    """All operations but splitting."""
    for flag, how in (("subtract", "anti"), ("intersect", "inner"), ("join", "left")):
        for name in getattr(args, flag):
            table = join(table, read_table(user_path(name)), args.on, how, f"--{flag} {name}")
    if args.where:
        table = where(table, args.where)
    if args.dedup:
        need(table, args.dedup, "--dedup")
        table = first_of_each(table, args.dedup)
    for flag, names in (("--sort", args.sort), ("--sort-ascending", args.sort_ascending)):
        if names:
            need(table, names, flag)
            table = table.sort(names, descending=flag == "--sort", nulls_last=True, maintain_order=True)
    if args.shuffle:
        table = table.sample(fraction=1.0, shuffle=True, seed=args.seed)
    if args.sample is not None:
        rows = sorted(pl.Series(range(table.height)).sample(min(args.sample, table.height), seed=args.seed).to_list())
        table = table[rows]
    if args.head is not None:
        table = table.head(args.head)
    if args.columns:
        need(table, args.columns, "--columns")
        table = table.select(args.columns)
    return table


def pieces_of(table: pl.DataFrame, args: argparse.Namespace) -> dict[Path, pl.DataFrame]:
    """What goes into which file: one, ``--split`` of nearly equal length, or training and validation."""
    if args.validation is not None:
        training, validation = split_by_source(table, args.validation, args.together, args.seed)
        return {args.out: training, _named(args.out, "validation"): validation}
    edges = [table.height * part // args.split for part in range(args.split + 1)]
    return {path: table[first:last] for path, first, last in zip(outputs(args), edges, edges[1:])}


def outputs(args: argparse.Namespace) -> list[Path]:
    """Files that a command line writes: ``OUT``, ``OUT_1``, ``OUT_2``, ..., or ``OUT`` and ``OUT_validation``."""
    if args.validation is not None:
        return [args.out, _named(args.out, "validation")]
    return [args.out] if args.split == 1 else [_named(args.out, str(part + 1)) for part in range(args.split)]


def _named(out: Path, word: str) -> Path:
    return out.with_name(f"{out.stem}_{word}{out.suffix}")


def split_by_source(table: pl.DataFrame, share: float, column: str, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows for training and for validation. Rows that are equal in ``column`` (cut from one source) stay together.

    Sources go to validation in the order of a hash of their name and ``seed``, until it has its share of the rows. So
    the split is the same whatever the order of the rows, and nearly the same when there are more.

    Raises:
        UserError: no such column, or too few sources for two tables.
    """
    if column not in table.columns:
        raise UserError(
            f"--together {column}: no such column, and clips of one source must not be divided; "
            f"export.py --columns {column} adds it, or name another (path: each row by itself)"
        )
    counts = table.group_by(column).len().rows()
    counts.sort(key=lambda row: hashlib.sha256(f"{seed} {row[0]}".encode("utf-8", "surrogatepass")).digest())
    wanted, taken = share * table.height, 0
    chosen: list[Any] = []
    for name, count in counts[:-1]:  # one source is left for training
        if chosen and taken + count / 2 > wanted:
            break
        chosen.append(name)
        taken += count
    if not chosen:
        raise UserError(f"--validation {share:g}: {len(counts)} sources in column '{column}'; two are needed at least")
    held = pl.col(column).is_in(pl.Series(chosen, dtype=table[column].dtype).implode(), nulls_equal=True)
    return table.filter(~held), table.filter(held)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="CSV or parquet files, or patterns")
    parser.add_argument("--out", type=user_path, required=True, help=".csv or .parquet")
    parser.add_argument("--on", default="path", help="column that joins tables (default: path)")
    parser.add_argument("--subtract", action="append", default=[], metavar="TABLE", help="drop rows that it has")
    parser.add_argument(
        "--intersect", action="append", default=[], metavar="TABLE", help="keep rows that it has, add its columns"
    )
    parser.add_argument("--join", action="append", default=[], metavar="TABLE", help="add its columns")
    parser.add_argument(
        "--where", metavar="SQL", help="keep rows that meet a condition: 'fps >= 16 AND text IS NOT NULL'"
    )
    parser.add_argument(
        "--dedup",
        action=Converted,
        convert=names_of,
        metavar="A,B",
        help="keep the first row of those that are equal there",
    )
    parser.add_argument("--sort", action=Converted, convert=names_of, metavar="A,B", help="largest first")
    parser.add_argument("--sort-ascending", action=Converted, convert=names_of, metavar="A,B", help="smallest first")
    parser.add_argument("--shuffle", action="store_true", help="random order")
    count: dict[str, Any] = {"type": int, "action": Bounded, "metavar": "N"}
    parser.add_argument("--sample", **count, least=0, help="keep so many at random, in their order")
    parser.add_argument("--head", **count, least=0, help="keep the first")
    parser.add_argument(
        "--columns", action=Converted, convert=names_of, metavar="A,B", help="keep these columns, in this order"
    )
    parser.add_argument("--split", **count, least=1, most=10_000, default=1, help="write so many files")
    parser.add_argument(
        "--validation",
        type=float,
        action=Bounded,
        least=0.001,
        most=0.9,
        metavar="SHARE",
        help="write so many of the rows to OUT_validation, whole sources (see --together)",
    )
    parser.add_argument(
        "--together",
        default="source_id",
        metavar="COLUMN",
        help="rows that are equal there are not divided by --validation (default: source_id)",
    )
    seed: dict[str, Any] = {"type": int, "action": Bounded, "least": 0, "most": 2**63 - 1}
    parser.add_argument("--seed", **seed, default=0, help="of --shuffle, --sample and --validation")
    add_overwrite(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read, change, write; print what came of it."""
    args = parse_args(argv)
    check_format(args.out)
    if args.validation is not None and args.split > 1:
        raise UserError("--validation and --split: choose one")
    files = find_files(args.inputs)
    for path in outputs(args):
        check_place(path, "--out")
        check_no_input(path, [*files, *(user_path(name) for name in (*args.subtract, *args.intersect, *args.join))])
    table = read_all(files)
    before = table.height
    pieces = pieces_of(transform(table, args), args)
    for path, piece in pieces.items():
        print(write_new(path, partial(fill_table, piece), args.overwrite))
    print(f"{before} rows in, {' + '.join(str(piece.height) for piece in pieces.values())} out")


if __name__ == "__main__":
    run_main(main)
