"""Captions that lie beside footage: ``NAME.txt`` for ``NAME.mp4``, and JSON lines that name files and their texts."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from opensora.utils.errors import UserError, shorten
from opensora.utils.logging import get_logger
from opensora.utils.paths import is_file, read_text

logger = get_logger(__name__)

FILE_KEYS = ("file_name", "path", "file", "video", "image", "video_path", "image_path")
TEXT_KEYS = ("text", "caption", "prompt")
LONGEST = 10_000  # characters of a caption; a longer text beside a film is its transcript, or notes


def with_captions(table: pl.DataFrame, folders: Iterable[Path] = ()) -> pl.DataFrame:
    """The table with column ``text`` filled in from what lies beside its files; as it is where there is nothing.

    What the table says itself counts first, then a file's own ``.txt``, then JSON lines.

    Args:
        table: has column ``path``.
        folders: looked through for ``*.jsonl`` besides those that the files are in.

    Raises:
        UserError: a text that is not UTF-8, or a line that cannot be read.
    """
    paths = table["path"].to_list()
    places = dict.fromkeys([*folders, *(Path(path).parent for path in paths)])
    listed = {path: text for folder in places for path, text in read_lines(folder).items()}
    names = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - as the names in JSON lines, links not followed
    found = [_beside(Path(path)) or listed.get(name) for path, name in zip(paths, names)]
    others = sorted(listed.keys() - set(names))
    if others:
        logger.warning("captions of %d files that are not among the footage: %s", len(others), shorten(others))
    if not any(found):
        return table
    logger.info("captions beside the footage: %d of %d files", sum(map(bool, found)), len(found))
    texts = pl.Series("text", found, pl.String)
    if "text" in table.columns:
        own = pl.col("text").cast(pl.String)
        return table.with_columns(pl.when(own.is_null() | (own == "")).then(texts).otherwise(own).alias("text"))
    return table.with_columns(texts)


def _beside(path: Path) -> str | None:
    """The text of ``NAME.txt`` beside a file, or of ``NAME.mp4.txt``."""
    for place in (path.with_suffix(".txt"), path.with_name(f"{path.name}.txt")) if path.name else ():
        if not is_file(place):
            continue
        try:
            text = " ".join(read_text(place, "utf-8-sig").split())
        except UnicodeDecodeError:
            raise UserError(f"{place}: not UTF-8 text, so no caption can be read from it; save it as UTF-8") from None
        if len(text) > LONGEST:
            logger.warning("%s is no caption: %d characters, more than %d", place, len(text), LONGEST)
            continue
        return text or None
    return None


def read_lines(folder: Path) -> dict[str, str]:
    """Captions that the ``*.jsonl`` of a folder hold, by absolute path. Files whose first line names no file and text
    are of another kind, or damaged: left alone, with a warning."""
    captions: dict[str, str] = {}
    for file in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        if file.is_file():
            captions.update(_captions_of(file))
    return captions


def _captions_of(file: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    first, twice = True, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            entry = _parsed(line)
            name, text = _found(entry, FILE_KEYS), _found(entry, TEXT_KEYS)
            if first and (name is None or not any(key in entry for key in TEXT_KEYS)):
                logger.warning("%s: no captions are read from it, its first line names no file and text", file)
                return {}
            first = False
            if not isinstance(name, str) or not isinstance(text, str | None):
                keys = f"one of {', '.join(FILE_KEYS)}, and its text under one of {', '.join(TEXT_KEYS)}"
                raise UserError(f"{file}: line {number}: expected an object with the name of a file under {keys}")
            if text:
                place = os.path.abspath(file.parent / name)  # noqa: PTH100
                twice += place in captions
                captions[place] = " ".join(text.split())
    if twice:
        logger.warning("%s: %d captions of files that have one already; the last one counts", file, twice)
    return captions


def _parsed(line: bytes) -> Mapping[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # the latter of thousands of brackets
        return {}
    return entry if isinstance(entry, dict) else {}


def _found(entry: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)
