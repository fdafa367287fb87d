"""Files that a config names: relative paths start where the config's files are, then in the working folder."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opensora.config.keys import group_options
from opensora.config.shipped import CONFIGS
from opensora.utils.paths import is_at_hand, is_there, split_place

# what a key with ``reads=KIND`` holds -> what stands between several paths in one text
SEPARATORS: Mapping[str, str] = MappingProxyType({"file": "", "references": ";", "adapters": ","})
STRENGTH = "@"  # between the path of an adapter and its strength


def places_of(files: Iterable[Path]) -> tuple[Path, ...]:
    """Where relative paths in a config start from.

    Args:
        files: the config and those that it builds on, in this order.

    Returns:
        The folder of each, and the one that holds the folder ``configs`` which it lies in.
    """
    places = []
    for file in files:
        folder = Path(os.path.normpath(file.absolute().parent))
        places.append(folder)
        if CONFIGS in folder.parts:
            places.append(Path(*folder.parts[: len(folder.parts) - folder.parts[::-1].index(CONFIGS) - 1]))
    return tuple(dict.fromkeys(places))


def with_places(data: Mapping[str, Any], options: type | None, places: Sequence[Path]) -> dict[str, Any]:
    """A config's checked content with the files that it names where they are.

    A path stays as it is written where it leads to the same file from the working folder, and where there is none.
    """
    return _changed(data, options, lambda value, kind: _located(value, kind, places))


def named_files(data: Mapping[str, Any], options: type | None) -> list[str]:
    """Every path that a config's checked content names."""
    found: list[str] = []

    def note(value: Any, kind: str) -> Any:
        found.extend(path for text in _texts(value) for path in _split(text, kind))
        return value

    _changed(data, options, note)
    return found


def is_relative(path: str) -> bool:
    """Whether it depends on a folder where a path leads to."""
    return bool(path) and "://" not in path and not path.startswith("~") and not Path(path).is_absolute()


def _changed(data: Mapping[str, Any], options: type | None, change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """The content with every value changed that names files."""
    known, result = group_options(options), dict(data)
    for key, option in known.items():
        value = data.get(key)
        if option.is_section and isinstance(value, Mapping):
            base = option.registry.base if option.registry is not None else None
            result[key] = _changed(value, option.group(value) or base, change)
        elif value is not None and "reads" in option.metadata:
            result[key] = change(value, option.metadata["reads"])
    return result


def _texts(value: Any) -> Iterator[str]:
    yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def _split(text: str, kind: str) -> list[str]:
    """Paths in a text, without strengths."""
    parts = [part.strip() for part in text.split(SEPARATORS[kind])] if SEPARATORS[kind] else [text]
    return [_path_of(part, kind) for part in parts]


def _path_of(entry: str, kind: str) -> str:
    if kind == "references":
        return split_place(entry)[0]
    path, at, _ = entry.rpartition(STRENGTH)
    return path if kind == "adapters" and at and not is_there(entry) else entry


def _located(value: Any, kind: str, places: Sequence[Path]) -> Any:
    if isinstance(value, list):
        return [_located(each, kind, places) for each in value]
    if not isinstance(value, str):
        return value
    mark = SEPARATORS[kind]
    parts = [part.strip() for part in value.split(mark)] if mark else [value]
    found = [_entry(part, kind, places) for part in parts]
    if found == parts or any(mark and mark in path for path in found):  # a folder's name may hold the mark
        return value
    return mark.join(found)


def _entry(entry: str, kind: str, places: Sequence[Path]) -> str:
    """A path, maybe with a strength, where it leads."""
    found = _place(entry, places)  # a name may hold the mark of a strength
    if kind == "references" and found == entry and (parts := split_place(entry))[1]:
        return f"{_place(parts[0], places)}@{parts[1]}"
    path, at, strength = entry.rpartition(STRENGTH)
    if kind != "adapters" or not at or found != entry or is_there(entry):
        return found
    return f"{_place(path, places)}{at}{strength}"


def _place(path: str, places: Sequence[Path]) -> str:
    """Where a path leads from the first place that has such a file."""
    if not is_relative(path):
        return path
    for place in places:
        found = place / path
        if is_at_hand(found):
            same = is_there(path) and is_there(found) and found.samefile(path)
            return path if same else str(found)
    return path
