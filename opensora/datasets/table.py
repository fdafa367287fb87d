"""Reading the table (CSV or parquet) that lists a dataset, and finding its mistakes before anything is built."""

import csv
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opensora.utils.errors import UserError, first_line
from opensora.utils.files import write_beside
from opensora.utils.paths import expand_home, is_file, is_there

MEDIA_COLUMNS = ("path", "num_frames", "height", "width", "fps")
TEXT_COLUMNS = ("path", "text")
WHOLE = r"-?\d{1,18}"
SHOWN_LETTERS = 60  # of a row that cannot be


@contextmanager
def reading_table(path: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Within it, a table is read: whatever is wrong with it is said in the same words.

    Args:
        path: of the table, ``.csv`` or ``.parquet``.
        kinds: further errors of the library that reads it.

    Raises:
        UserError: missing file, other format, or one of ``kinds``, ``ValueError`` or ``OSError``.
    """
    path = expand_home(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file (expected a CSV or parquet table)")
    check_table_name(path)
    expected: tuple[type[Exception], ...] = (ValueError, OSError, *kinds)  # pandas and pyarrow errors derive from these
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as a table (not text in UTF-8; save it as CSV in UTF-8)") from error
    except expected as error:
        raise UserError(f"{path}: cannot be read as a table ({first_line(error)})") from error


def read_table(path: str | Path, as_text: bool = False) -> pd.DataFrame:
    """Read ``.csv`` or ``.parquet``.

    Paths and captions of a CSV are taken letter by letter: ``7``, ``007`` and ``None`` are texts there; only an empty
    cell is none. Whole numbers stay whole, with all their digits, where some cells of their column are empty (dtype
    ``Int64``).

    Args:
        path: of the table.
        as_text: every cell as text, "" where it is empty; words such as ``none`` stay words, and blank lines rows,
            but for those at the end.

    Raises:
        UserError: missing file, other format, a file that cannot be parsed, or two columns of one name.
    """
    path = expand_home(path)
    with reading_table(path):
        if path.suffix == ".csv":
            table = _read_csv(path, as_text)
        else:
            table = _read_parquet(path)
            table = table.astype(object).where(table.notna(), "").map(_cell_text) if as_text else table
        _check_names(table.columns)
    return table


def _read_csv(path: Path, as_text: bool) -> pd.DataFrame:
    words: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    _check_names(pd.read_csv(path, header=None, nrows=1, **words).iloc[0])  # pandas renames the second of two
    try:
        table = _without_tail(pd.read_csv(path, skip_blank_lines=False, **words)) if as_text else pd.read_csv(path)
    except pd.errors.ParserError:
        check_fields(path)
        raise
    if not isinstance(table.index, pd.RangeIndex):
        check_fields(path)
    holed = [] if as_text else [name for name in table if table[name].dtype == float and table[name].isna().any()]
    cells = pd.read_csv(path, usecols=holed, **words) if holed else pd.DataFrame()
    for name in holed:
        there = table[name].notna()  # empty cells are none, and so are NA, null and the like
        if there.any() and cells[name][there].str.strip().str.fullmatch(WHOLE).all():
            table[name] = pd.array([int(cell) if is_one else None for cell, is_one in zip(cells[name], there)], "Int64")
    texts = [name for name in TEXT_COLUMNS if name in table and not as_text]
    if texts:  # pandas knows one set of words for "nothing" only, and in numbers NA and null are what they say
        table[texts] = pd.read_csv(path, usecols=texts, na_values=[""], **words)[texts]
    return table


def _without_tail(table: pd.DataFrame) -> pd.DataFrame:
    filled = (table != "").any(axis=1).to_numpy()
    return table.iloc[: int(filled.nonzero()[0][-1]) + 1 if filled.any() else len(table)]


def check_fields(path: Path) -> NoReturn:
    """Raise a ValueError that names the first row with more fields than the header."""
    what = "its rows have more fields than its header; quote texts that contain commas"
    with path.open(newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
        rows = csv.reader(file)
        expected = len(next(rows, []))
        for index, row in enumerate(rows):
            if len(row) > expected:
                raise ValueError(f"{what}; row {row_number(index)}: {','.join(row)[:SHOWN_LETTERS]!r}")
    raise ValueError(what)


def _read_parquet(path: Path) -> pd.DataFrame:
    content = pq.read_table(path)
    for field in content.schema:
        if field.name in TEXT_COLUMNS and (pa.types.is_nested(field.type) or _is_bytes(field.type)):
            raise ValueError(f"column '{field.name}' holds {field.type}, not text")
    table = content.to_pandas()
    holed = [f.name for f in content.schema if pa.types.is_integer(f.type) and f.name in table]
    holed = [name for name in holed if table[name].dtype == float]  # so that there is room for nothing
    return table.assign(**{name: content[name].to_pandas(integer_object_nulls=True).astype("Int64") for name in holed})


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def as_written(table: pd.DataFrame, path: Path, but: Sequence[str]) -> pd.DataFrame:
    """A table that was read from a CSV, its columns ``but`` some letter by letter: 007, 1.50 and NA as they stand
    there."""
    others = [name for name in table.columns if name not in (*but, *TEXT_COLUMNS)]
    if not others:
        return table
    return table.assign(**pd.read_csv(path, usecols=others, dtype=str, keep_default_na=False))


def _check_names(names: Iterable[Any]) -> None:
    seen: set[str] = set()
    for name in map(str, names):
        if name in seen and name:
            raise ValueError(f"two columns are named '{name}'")
        seen.add(name)


def _cell_text(value: Any) -> str:
    """A cell of a parquet table as a CSV would have it; whole numbers keep all their digits."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def row_number(index: int) -> int:
    """A row as spreadsheets count: the header is row 1."""
    return int(index) + 2


def row_name(path: str | Path, index: int) -> str:
    """How messages name a row of a table, of which ``index`` is counted from 0."""
    return f"{path}, row {row_number(index)}"


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Write ``.csv`` or ``.parquet`` beside its place and rename it, so that the file is whole or absent.

    Raises:
        UserError: other format, or the place cannot be written.
    """
    path = Path(path)
    check_table_name(path)

    try:
        return write_beside(path, lambda target: fill_table(table, target))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def fill_table(table: pd.DataFrame, target: Path) -> None:
    """Write a table in place: into a temporary file whose name nobody is to hear of."""
    if target.suffix == ".csv":
        table.to_csv(target, index=False)
    else:
        table.to_parquet(target, index=False)


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
    if len(table.columns) == 1 and (other := [sign for sign in ";\t|" if sign in str(table.columns[0])]):
        hint = f"Its columns are separated by {other[0]!r}; separate them by commas. {hint}"
    raise UserError(f"{path}: missing column {named}; found {', '.join(map(str, table.columns))}. {hint}".rstrip())


def locate(raw: str, folder: Path) -> Path:
    """Where a path of a table leads: ``~`` to the home folder; relative ones to the working directory if the file is
    there, otherwise to the table's ``folder``."""
    path = expand_home(raw)
    return path if path.is_absolute() or is_there(path) else folder / path


def resolve_media_paths(table: pd.DataFrame, table_path: str | Path, column: str = "path") -> pd.DataFrame:
    """A copy whose media paths are usable from here (see :func:`locate`).

    Raises:
        UserError: there are no rows, or clips are missing; the first of these are named.
    """
    if table.empty:
        raise UserError(f"{table_path}: has no rows")
    folder = expand_home(table_path).parent
    resolved, missing = [], []
    for row, raw in enumerate(table[column]):
        path = locate(str(raw), folder)
        if not is_file(path):
            missing.append(f"row {row_number(row)}: {raw}")
        resolved.append(str(path))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{table_path}: {len(missing)} of {len(table)} clips are missing: {'; '.join(missing[:3])}{more}"
        )
    return table.assign(**{column: resolved})
