"""Reading the table (CSV or parquet) that lists a dataset, and finding its mistakes before anything is built."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from opensora.utils.errors import UserError
from opensora.utils.files import write_beside

MEDIA_COLUMNS = ("path", "num_frames", "height", "width", "fps")
TEXT_COLUMNS = ("path", "text")


def read_table(path: str | Path) -> pd.DataFrame:
    """Read ``.csv`` or ``.parquet``.

    Paths and captions of a CSV are taken letter by letter: ``7``, ``007`` and ``None`` are texts there; only an empty
    cell is none.

    Raises:
        UserError: missing file, other format, or a file that cannot be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a CSV or parquet table)")
    check_table_name(path)
    try:
        return _read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:  # pandas and pyarrow errors derive from these
        raise UserError(f"{path}: cannot be read as a table ({error})") from error


def _read_csv(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("its rows have more fields than its header; a text with commas must stand in quotes")
    texts = [name for name in TEXT_COLUMNS if name in table]
    if texts:  # pandas knows one set of words for "nothing" only, and in numbers NA and null are what they say
        table[texts] = pd.read_csv(path, usecols=texts, dtype=str, keep_default_na=False, na_values=[""])[texts]
    return table


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Write ``.csv`` or ``.parquet`` beside its place and rename it, so that the file is whole or absent.

    Raises:
        UserError: other format, or the place cannot be written.
    """
    path = Path(path)
    check_table_name(path)

    def write(target: Path) -> None:
        if path.suffix == ".csv":
            table.to_csv(target, index=False)
        else:
            table.to_parquet(target, index=False)

    try:
        return write_beside(path, write)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def check_table_name(path: Path) -> None:
    """Raise a UserError unless the file name ends in ``.csv`` or ``.parquet``."""
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path}: '{path.suffix}' is not a table format; use .csv or .parquet")


def require_columns(table: pd.DataFrame, columns: Sequence[str], path: str | Path, hint: str = "") -> None:
    """Raise a UserError that names every missing column, with the nearest present one."""
    missing = [column for column in columns if column not in table.columns]
    if not missing:
        return
    near = {name: difflib.get_close_matches(name, map(str, table.columns), 1) for name in missing}
    named = ", ".join(f"'{name}'" + (f" (is '{match[0]}' meant?)" if match else "") for name, match in near.items())
    raise UserError(f"{path}: missing column {named}; found {', '.join(map(str, table.columns))}. {hint}".rstrip())


def locate(raw: str, folder: Path) -> Path:
    """Where a path of a table leads: relative ones are taken from the working directory if the file is there,
    otherwise from the table's ``folder``."""
    path = Path(raw)
    return path if path.is_absolute() or path.exists() else folder / path


def resolve_media_paths(table: pd.DataFrame, table_path: str | Path, column: str = "path") -> pd.DataFrame:
    """A copy whose media paths are usable from here (see :func:`locate`).

    Raises:
        UserError: clips are missing; the first rows are named.
    """
    folder = Path(table_path).parent
    resolved, missing = [], []
    for row, raw in enumerate(table[column]):
        path = locate(str(raw), folder)
        if not path.exists():
            missing.append(f"row {row + 2}: {raw}")
        resolved.append(str(path))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{table_path}: {len(missing)} of {len(table)} clips are missing: {'; '.join(missing[:3])}{more}"
        )
    return table.assign(**{column: resolved})
