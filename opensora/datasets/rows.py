"""Rows of a dataset's table: held in memory, or read one by one from parquet shards.

A table of a million captions takes gigabytes once every loader worker has touched it. Training needs the numbers of all
rows (to sort them into buckets), but paths and captions only of the rows at hand: those stay in shards that
``scripts/cnv/shard.py`` writes beside the table, ``clips.parquet`` -> ``clips/00001.parquet`` and so on.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opensora.datasets.table import locate, reading_table, require_columns, row_name
from opensora.utils.errors import UserError, shorten
from opensora.utils.files import discard_folder, write_beside, write_text
from opensora.utils.logging import get_logger
from opensora.utils.paths import expand_home, own_command

logger = get_logger(__name__)

NUMBER_COLUMNS = ("num_frames", "height", "width", "fps")  # what buckets are made of
DROPPED_COLUMNS = (*NUMBER_COLUMNS, "aspect_ratio", "resolution")  # not repeated in shards
ROWS_PER_SHARD = 10_000  # default of scripts/cnv/shard.py
ROW_GROUP = 128  # rows decoded at a time to get at one
GROUPS_IN_MEMORY = 16  # of each loader worker
SUMMARY = "shards.json"
SHARD_NAME = re.compile(r"\d{5,}\.parquet")
NEW = ".shards.writing"  # folder of shards that are being written


class TableRows:
    """Rows of a table in memory, as dicts."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._values = {str(name): table[name].to_numpy() for name in table.columns}
        self._length = len(table)

    def __len__(self) -> int:
        return self._length

    @property
    def columns(self) -> list[str]:
        """Names of the values in a row."""
        return list(self._values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self._values.items()}


class ShardedRows:
    """Rows of the shards that belong to a parquet table; a few row groups are kept in memory.

    Args:
        table_path: the table that was sharded; relative media paths are found from its folder.
        num_rows: rows of that table.

    Raises:
        UserError: no shards, too few of them, or shards of another state of the table; says how to write them.
    """

    def __init__(self, table_path: str | Path, num_rows: int) -> None:
        self.table_path, self.num_rows = expand_home(table_path), num_rows
        self.folder = shard_folder(self.table_path)
        self.files = sorted(self.folder.glob("[0-9]*.parquet"))
        command = f"{own_command('shard', 'scripts/cnv/shard.py')} {self.table_path}"
        if not self.files:
            raise UserError(f"memory_efficient reads from shards, but {self.folder} holds none; write them: {command}")
        self.rows_per_shard = pq.read_metadata(self.files[0]).num_rows
        expected = math.ceil(num_rows / max(self.rows_per_shard, 1))
        present = (len(self.files) - 1) * self.rows_per_shard + pq.read_metadata(self.files[-1]).num_rows
        if len(self.files) != expected or present != num_rows:
            raise UserError(
                f"{self.folder}: {len(self.files)} shards hold {present} rows, {self.table_path} has {num_rows}; "
                f"write them again: {command}"
            )
        self._check_summary(command)
        self.columns = [str(name) for name in pq.read_schema(self.files[0]).names]
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def _check_summary(self, command: str) -> None:
        summary = self.folder / SUMMARY  # shards written by other tools have none
        if summary.is_file() and json.loads(summary.read_text())["table_bytes"] != self.table_path.stat().st_size:
            raise UserError(f"{self.table_path} changed since its shards were written; write them again: {command}")

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        """Workers start with an empty memory of their own."""
        return {**self.__dict__, "_groups": OrderedDict()}

    def __getitem__(self, row: int) -> dict[str, Any]:
        shard, inside = divmod(row, self.rows_per_shard)
        file = pq.ParquetFile(self.files[shard]) if self._needs_file(shard, inside) else None
        if file is not None:
            with file:
                self._read_group(file, shard, inside)
        first, group = self._find(shard, inside)
        values = group.slice(inside - first, 1).to_pylist()[0]
        return {**values, "path": str(locate(str(values["path"]), self.table_path.parent))}

    def _find(self, shard: int, inside: int) -> tuple[int, pa.Table]:
        for key in reversed(self._groups):
            group = self._groups[key]
            if key[0] == shard and key[1] <= inside < key[1] + len(group):
                self._groups.move_to_end(key)
                return key[1], group
        raise KeyError(inside)

    def _needs_file(self, shard: int, inside: int) -> bool:
        try:
            self._find(shard, inside)
        except KeyError:
            return True
        return False

    def _read_group(self, file: pq.ParquetFile, shard: int, inside: int) -> None:
        first = 0
        for number in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            if inside < first + size:
                self._groups[shard, first] = file.read_row_group(number)
                break
            first += size
        while len(self._groups) > GROUPS_IN_MEMORY:
            self._groups.popitem(last=False)


def shard_folder(table_path: Path) -> Path:
    """Folder of a table's shards: its name without the ending, beside it."""
    return table_path.with_suffix("")


def read_numbers(path: str | Path, extra: Sequence[str] = (), scores: Sequence[str] = ()) -> pd.DataFrame:
    """The number columns of a parquet table, 4 bytes each, without reading the others.

    Args:
        path: of the table.
        extra: further columns that it must have.
        scores: number columns that are looked at, where there are such, and not kept.

    Raises:
        UserError: not a parquet table, missing columns, or a cell that cannot be (see :func:`with_numbers`).
    """
    path = expand_home(path)
    if path.suffix == ".csv":
        raise UserError(f"{path}: memory_efficient needs a parquet table; scripts/cnv/meta.py writes one")
    with reading_table(path, pa.ArrowException):
        file = pq.ParquetFile(path)
    names = list(file.schema_arrow.names)
    require_columns(pd.DataFrame(columns=names), [*NUMBER_COLUMNS, *extra], path, hint="scripts/cnv/meta.py adds them.")
    columns: dict[str, np.ndarray] = {}
    for name in NUMBER_COLUMNS:  # column by column, so that no more than one is held twice
        columns[name] = _numbers(file.read(columns=[name]).column(0).to_pandas(), name, path)
    for name in set(scores) & set(names):
        _numbers(file.read(columns=[name]).column(0).to_pandas(), name, path)
    return pd.DataFrame({**columns, "fps": columns["fps"].astype(np.float32)}, copy=False)


def with_numbers(table: pd.DataFrame, path: str | Path, scores: Sequence[str] = ()) -> pd.DataFrame:
    """A copy whose number columns hold numbers: lengths and sizes as int32, rates and those ``scores`` that there are
    as float64 (NaN where a cell is empty).

    Raises:
        UserError: names the first cell that is not a number, or out of range.
    """
    return table.assign(
        **{name: _numbers(table[name], name, path) for name in (*NUMBER_COLUMNS, *scores) if name in table}
    )


def _numbers(cells: pd.Series, name: str, path: str | Path) -> np.ndarray:
    """A column of a table as numbers, see :func:`with_numbers`."""
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    if name in ("num_frames", "height", "width"):
        expected, bad = "a whole number from 1", ~((values >= 1) & (values < 2**31) & (values == np.floor(values)))
    else:
        expected, bad = "a number from 0, or nothing", (values < 0) | np.isinf(values)
        bad |= np.isnan(values) & cells.notna().to_numpy()
    if bad.any():
        row = int(bad.argmax())
        cell = cells.iloc[row]
        shown = "empty" if pd.isna(cell) else repr(cell) if isinstance(cell, str) else f"{cell:g}"
        measured = "; scripts/cnv/meta.py measures it" if name in NUMBER_COLUMNS else ""
        raise UserError(
            f"{row_name(path, row)}: {name} is {shown}, expected {expected} ({int(bad.sum())} rows in all){measured}"
        )
    return values.astype(np.int32) if expected.startswith("a whole") else values


def write_shards(path: str | Path, shards: int | None = None, overwrite: bool = False) -> Path:
    """Split a parquet table into shards: the whole of ``scripts/cnv/shard.py``.

    Args:
        path: parquet table.
        shards: number of files; None makes files of :data:`ROWS_PER_SHARD` rows.
        overwrite: replace shards that are there.

    Returns:
        Folder of the shards.

    Raises:
        UserError: not a parquet table, an empty one, more shards than rows, or shards that are there already.
    """
    path = expand_home(path)
    if path.suffix != ".parquet" or not path.is_file():
        raise UserError(f"{path}: expected an existing .parquet table; scripts/cnv/meta.py writes one")
    with reading_table(path, pa.ArrowException):
        table = pq.read_table(path)
    count = math.ceil(len(table) / ROWS_PER_SHARD) if shards is None else shards
    if not 1 <= count <= len(table):
        raise UserError(f"{path}: {len(table)} rows cannot be split into {count} shards")
    folder = shard_folder(path)
    old = sorted(folder.glob("[0-9]*.parquet"))
    if old and not overwrite:
        raise UserError(f"{folder} holds {len(old)} shards already; --overwrite replaces them")
    foreign = [file.name for file in old if not SHARD_NAME.fullmatch(file.name)]
    if foreign:
        raise UserError(f"{folder} holds {shorten(foreign)}, which would be read as shards; move them away")
    table = table.drop_columns([name for name in DROPPED_COLUMNS if name in table.column_names])
    size = math.ceil(len(table) / count)
    new = folder / NEW
    discard_folder(new)
    try:
        for number, start in enumerate(range(0, len(table), size), start=1):
            _write_part(table.slice(start, size), new / f"{number:05d}.parquet")
        _replace_shards(old, new)
    finally:
        discard_folder(new)
    write_text(json.dumps({"rows": len(table), "table_bytes": path.stat().st_size}), folder / SUMMARY)
    return folder


def _replace_shards(old: Sequence[Path], new: Path) -> None:
    """Let new shards, all of them written, take the place of old ones; shards of a state in between are refused."""
    if old:
        write_text(json.dumps({"rows": 0, "table_bytes": -1}), new.parent / SUMMARY)
    names = {file.name for file in new.iterdir()}
    for name in sorted(names):
        (new / name).replace(new.parent / name)
    for file in old:
        if file.name not in names:
            file.unlink()


def _write_part(part: pa.Table, path: Path) -> None:
    write_beside(path, lambda target: pq.write_table(part, target, ROW_GROUP))
