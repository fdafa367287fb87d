"""Tables on disk: CSV, parquet or JSON lines, by their ending."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from opensora.utils.errors import UserError, first_line
from opensora.utils.files import nameless_error

FORMATS = (".csv", ".parquet")
READ_FORMATS = (*FORMATS, ".jsonl")
DAMAGED = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)  # what reading one raises
TEXTS = {"path": pl.String, "text": pl.String}  # a file may be called 007, and so may what it shows
MORE_FIELDS = "found more fields"  # polars', which names no row
TEXT_BYTES = 4096  # of a CSV, looked at
TWICE = re.compile(r"(.+)_duplicated_\d+")  # what polars calls a column whose name came before


def read_table(path: Path, needs: Sequence[str] = ()) -> pl.DataFrame:
    """A CSV, parquet or JSON lines file.

    Args:
        path: its name tells the format.
        needs: columns that it must have.

    Raises:
        UserError: missing, of another kind, damaged, two columns of one name, or without a column that it needs.
    """
    from opensora.datasets.table import check_fields, reading_table  # not above: pandas, and --help reads this file

    if path.suffix.lower() == ".jsonl" and path.is_file():
        try:
            table = _read(path)
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as JSON lines ({error})") from error
    else:
        with reading_table(path):
            try:
                table = _read(path)
            except ValueError as error:
                if MORE_FIELDS in str(error):
                    check_fields(path)
                raise
    absent = [name for name in needs if name not in table.columns]
    if absent:
        raise UserError(f"{path}: no column '{absent[0]}'; found {', '.join(table.columns)}")
    return table


def _read(path: Path) -> pl.DataFrame:
    """Raises a ValueError of one line, whatever is wrong."""
    try:
        if path.suffix.lower() == ".parquet":
            return pl.read_parquet(path, glob=False)
        if path.suffix.lower() == ".jsonl":
            return pl.read_ndjson(path, infer_schema_length=None)
        with path.open("rb") as file:
            if b"\0" in file.read(TEXT_BYTES):
                raise ValueError("not a text in UTF-8: it has zero bytes")
        table = pl.read_csv(path, infer_schema_length=None, schema_overrides=TEXTS, glob=False)
    except DAMAGED as error:
        raise ValueError(first_line(error)) from error
    for name in table.columns:
        again = TWICE.fullmatch(name)
        if again and again[1] in table.columns:
            raise ValueError(f"two columns are named '{again[1]}'")
    return table


def check_format(path: Path) -> None:
    """Raise a UserError for a file to be written that is neither CSV nor parquet."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path}: expected .csv or .parquet")


def fill_table(table: pl.DataFrame, path: Path) -> None:
    """Write a table as the ending of ``path`` says; in a CSV, lists are JSON text.

    Raises:
        UserError: it cannot be written there.
        OSError: the disk takes nothing more.
    """
    try:
        if path.suffix.lower() == ".csv":
            flat(table).write_csv(path)
        else:
            table.write_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        number = nameless_error(error)
        if number is not None:
            raise OSError(number, os.strerror(number)) from error
        raise UserError(f"{path.parent}: cannot write a table there ({first_line(error)})") from error


def flat(table: pl.DataFrame) -> pl.DataFrame:
    """Lists as JSON text, since a CSV holds none."""
    lists = [name for name, kind in table.schema.items() if isinstance(kind, pl.List)]
    return table.with_columns(
        pl.Series(
            name, [None if v is None else json.dumps(v, ensure_ascii=False) for v in table[name].to_list()], pl.String
        )
        for name in lists
    )
