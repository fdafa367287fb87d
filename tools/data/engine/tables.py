"""Tables on disk: CSV or parquet, by their ending."""

import json
from pathlib import Path

import polars as pl

from opensora.utils.errors import UserError
from opensora.utils.video import write_beside

FORMATS = (".csv", ".parquet")


def read_table(path: Path) -> pl.DataFrame:
    """A CSV or parquet file.

    Raises:
        UserError: missing, of another kind, or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a CSV or parquet table)")
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: '{path.suffix}' is not a table format; use .csv or .parquet")
    try:
        if path.suffix.lower() == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from error


def check_format(path: Path) -> None:
    """Raise a UserError for a file to be written that is neither CSV nor parquet."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path}: expected .csv or .parquet")


def write_table(table: pl.DataFrame, path: Path) -> Path:
    """Write a table, whole or not at all. In a CSV, lists are JSON text.

    Raises:
        UserError: another ending.
    """
    check_format(path)
    if path.suffix.lower() == ".csv":
        return write_beside(path, flat(table).write_csv)
    return write_beside(path, table.write_parquet)


def flat(table: pl.DataFrame) -> pl.DataFrame:
    """Lists as JSON text, since a CSV holds none."""
    lists = [name for name, kind in table.schema.items() if isinstance(kind, pl.List)]
    return table.with_columns(
        pl.Series(
            name, [None if v is None else json.dumps(v, ensure_ascii=False) for v in table[name].to_list()], pl.String
        )
        for name in lists
    )
