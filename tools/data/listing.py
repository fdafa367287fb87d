"""Which files there are: those of a folder, or those that a table lists; with the captions beside them."""

import os
from pathlib import Path

import polars as pl

from opensora.utils.errors import UserError, shorten
from opensora.utils.logging import get_logger
from opensora.utils.media.kinds import kind_of
from opensora.utils.paths import expand_home, is_file, is_there
from tools.data.engine.tables import read_table
from tools.data.sidecars import FILE_KEYS, TEXT_KEYS, with_captions

logger = get_logger(__name__)


def list_files(folder: Path) -> pl.DataFrame:
    """Images and videos below a folder, sorted by path: ``path, size, mtime``, and ``text`` where captions lie beside
    them. Links are followed, each folder once. What has none of the usual endings is looked into.

    Raises:
        UserError: no such folder, nothing in it that looks like a picture or a video, or a name that no table can hold.
    """
    from opensora.utils.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS  # not above: it imports torch

    usual = {*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS}
    if folder.is_file():
        raise UserError(f"--input {folder} is a file; give its folder, or a .csv / .parquet table that lists files")
    if not folder.is_dir():
        raise UserError(f"--input {folder}: no such folder (or .csv / .parquet table)")
    found: list[str] = []
    walked: list[Path] = []
    others: list[str] = []
    seen = {folder.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True):
        walked.append(Path(parent))
        folders[:] = [n for n in sorted(folders) if not n.startswith(".") and _is_new(Path(parent, n), seen)]
        for name in names:
            file = Path(parent) / name
            is_media = not name.startswith(".") and (file.suffix.lower() in usual or kind_of(file) is not None)
            (found if is_media else others).append(str(file))
    if not found:
        what = f"{len(others)} files, none of them a" if others else "no"
        raise UserError(f"--input {folder}: {what} picture or video")
    if others:
        logger.info("%d files are neither pictures nor videos: %s", len(others), shorten(sorted(others), 3))
    for path in found:
        if not _is_utf8(path):
            raise UserError(f"--input {folder}: the file name {os.fsencode(path)!r} is not UTF-8; rename it")
    return with_captions(_with_stat(pl.DataFrame({"path": sorted(found)})), walked)


def _is_new(folder: Path, seen: set[Path]) -> bool:
    """Whether a folder has not been walked under another name, and note that it has: a link may lead back up."""
    place = folder.resolve()
    new = place not in seen
    seen.add(place)
    return new


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_list(path: Path) -> pl.DataFrame:
    """Files that a table names in its column ``path``; its other columns stay. Relative paths are from its folder.

    JSON lines may call the columns by other names (``file_name``, ``caption``, ...).

    Raises:
        UserError: not a table, no column ``path``, or a row without one.
    """
    table = read_table(path)
    if path.suffix.lower() == ".jsonl":
        table = _renamed(_renamed(table, "path", FILE_KEYS), "text", TEXT_KEYS)
    if "path" not in table.columns:
        raise UserError(f"{path}: no column 'path'; found {', '.join(table.columns)}")
    table = table.with_columns(pl.col(name).cast(pl.String) for name in ("path", "text") if name in table.columns)
    paths = table["path"].to_list()
    if not paths:
        raise UserError(f"{path}: has no rows")
    if not all(paths):
        raise UserError(f"{path}: no path in row {next(n for n, p in enumerate(paths, 1) if not p)} of {len(paths)}")
    here = [str(_found(path.parent, name)) for name in paths]
    return with_captions(_with_stat(table.with_columns(pl.Series("path", here, pl.String))))


def _found(folder: Path, name: str) -> Path:
    """A file as a table in ``folder`` names it: from where the program runs, from that folder, or from home (``~``)."""
    path = expand_home(name)
    return path if is_there(path) else folder / path


def _renamed(table: pl.DataFrame, name: str, names: tuple[str, ...]) -> pl.DataFrame:
    """The table with the first of some columns that it has called ``name``."""
    found = next((n for n in names if n in table.columns), name)
    return table if name in table.columns else table.rename({found: name}, strict=False)


def _with_stat(table: pl.DataFrame) -> pl.DataFrame:
    stats = [Path(path).stat() if is_file(path) else None for path in table["path"]]
    return table.with_columns(
        pl.Series("size", [s.st_size if s else None for s in stats], pl.Int64),
        pl.Series("mtime", [s.st_mtime_ns if s else None for s in stats], pl.Int64),
    )
