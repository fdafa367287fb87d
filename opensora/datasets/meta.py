"""What the files of a table are: length, size and frame rate, as a reader finds them.

Decoding whole clips would take hours for what a header says in a millisecond: see :mod:`opensora.utils.media.probe`.
"""

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd

from opensora.datasets.table import (
    as_written,
    check_table_name,
    locate,
    read_table,
    require_columns,
    row_number,
    write_table,
)
from opensora.datasets.video_io import BrokenMediaError
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.media.probe import MediaInfo, probe
from opensora.utils.paths import expand_home
from opensora.utils.progress import Bar

logger = get_logger(__name__)

META_COLUMNS = ("num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
CHUNK = 16  # files handed to a worker at a time


def probe_media(path: str | Path) -> MediaInfo:
    """What a file is, see :func:`opensora.utils.media.probe.probe`.

    Raises:
        BrokenMediaError: missing or unreadable; the message says why.
    """
    try:
        return probe(path)
    except UserError as error:
        raise BrokenMediaError(str(error)) from error


def _probe_row(path: str) -> MediaInfo | str:
    """Result or reason; a plain value, since it comes from another process."""
    try:
        return probe_media(path)
    except BrokenMediaError as error:
        return str(error)


def _probe_all(paths: list[str], num_workers: int) -> Iterator[MediaInfo | str]:
    workers = min(num_workers, math.ceil(len(paths) / CHUNK))
    if workers <= 1:
        yield from map(_probe_row, paths)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(_probe_row, paths, chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise UserError("a worker died reading a file; --num_workers 0 shows after which one") from error


def add_media_columns(
    table: pd.DataFrame, folder: Path, num_workers: int = 0, progress: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Probe every file of a table.

    Args:
        table: has a column ``path``; relative paths are found as :func:`opensora.datasets.table.locate` does.
        folder: of the table.
        num_workers: processes; 0 works in this one.
        progress: show a bar with rate and time left.

    Returns:
        The readable rows with :data:`META_COLUMNS` (aspect_ratio is height / width, resolution height x width), and
        the unreadable ones as they were with columns ``row`` (line in the file, the header being 1) and ``error``.
    """
    paths = [str(locate(str(raw), folder)) for raw in table["path"]]
    results: Iterable[MediaInfo | str] = _probe_all(paths, num_workers)
    results = list(Bar(results, total=len(paths), unit="file", disable=not progress, mininterval=1.0))
    found = {i: r for i, r in enumerate(results) if isinstance(r, MediaInfo)}
    good = table.iloc[list(found)].drop(columns=[c for c in META_COLUMNS if c in table.columns])
    infos = list(found.values())
    good = good.assign(
        num_frames=[i.num_frames for i in infos],
        height=[i.height for i in infos],
        width=[i.width for i in infos],
        aspect_ratio=[i.height / i.width for i in infos],
        resolution=[i.height * i.width for i in infos],
        fps=[i.fps for i in infos],
    )
    bad = [(i, reason) for i, reason in enumerate(results) if isinstance(reason, str)]
    broken = table.iloc[[i for i, _ in bad]].assign(
        row=[row_number(i) for i, _ in bad], error=[reason for _, reason in bad]
    )
    return good, broken


def write_meta(
    source: str | Path, target: str | Path, num_workers: int | None = None, overwrite: bool = False
) -> tuple[int, int]:
    """Complete a table with what its files are: the whole of ``scripts/cnv/meta.py``.

    Unreadable files are left out of ``target`` and listed with the reason in ``<target stem>_broken.csv`` beside it; a
    list of an earlier call is replaced. Relative paths that would not be found from the target's folder are made
    absolute.

    Args:
        source, target: ``.csv`` or ``.parquet`` each.
        num_workers: processes; None takes one per CPU core, 0 works in this process.
        overwrite: replace existing results.

    Returns:
        Numbers of readable and of unreadable files.

    Raises:
        UserError: a table that is missing, empty or without ``path``, an existing target, or no readable file.
    """
    source, target = expand_home(source), expand_home(target)
    check_table_name(target)
    broken_path = target.with_name(f"{target.stem}_broken.csv")
    for path in (target, broken_path):
        if path.exists() and not overwrite and not (path == broken_path and _lists_broken(path)):
            raise UserError(f"{path} exists already: give another --output, or --overwrite to replace it")
    table = read_table(source)
    require_columns(table, ["path"], source)
    if table.empty:
        raise UserError(f"{source}: has no rows")
    if source.suffix == target.suffix == ".csv":
        table = as_written(table, source, META_COLUMNS)
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    good, broken = add_media_columns(table, source.parent, workers, progress=True)
    if len(broken):
        write_table(broken, broken_path)
        logger.warning("%d of %d files are unreadable, see %s", len(broken), len(table), broken_path)
    else:
        broken_path.unlink(missing_ok=True)
    if good.empty:
        raise UserError(f"{source}: none of its {len(table)} files is readable; the reasons are in {broken_path}")
    if source.parent.resolve() != target.parent.resolve():
        good = good.assign(path=[_portable(str(raw), source.parent) for raw in good["path"]])
    write_table(good, target)
    return len(good), len(broken)


def _lists_broken(path: Path) -> bool:
    """Whether a file is the list of unreadable files that an earlier `write_meta` left."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip().endswith("row,error")


def _portable(raw: str, folder: Path) -> str:
    """The path as it is if it is found from the working directory, else absolute."""
    found = locate(raw, folder)
    return raw if str(found) == raw else str(found.resolve())
