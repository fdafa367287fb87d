"""The folder of a cache while it is written: what is in it, and how another cache takes its place.

A cache that is to replace another is written into ``.new`` of its folder first; the old one goes once that is whole.
Only what a cache consists of is ever deleted.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from opensora.encoded.store import CacheInfo
from opensora.utils.errors import UserError, shorten
from opensora.utils.files import UNFINISHED, discard_folder, put_in_place, remove_folder, remove_unfinished_folders

NEW = ".new"
DESCRIPTION, INDEX, BROKEN = "cache.json", "index.parquet", "broken.csv"
PARTS = ("video", "text")
SHARD = re.compile(rf"\d+\.safetensors(\.partial)?|{re.escape(UNFINISHED)}.*")


def check_ours(folder: Path) -> None:
    """Refuse a folder in which something that is no cache's has the name of a part of one.

    Raises:
        UserError: says what is in the way.
    """
    parts = [name for name in (*PARTS, INDEX, BROKEN) if (folder / name).exists()]
    if parts and not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"{folder} holds {shorten(parts)}, but no cache ({DESCRIPTION} is missing): give another --cache-dir, or "
            "move them away"
        )
    if parts:
        CacheInfo.read(folder)
    strange = [str(path.relative_to(folder)) for path in _strange(folder)]
    if strange:
        raise UserError(f"{folder} holds files that are no cache's: {shorten(sorted(strange))}; move them away")


def _strange(folder: Path) -> Iterator[Path]:
    for name in PARTS:
        if (folder / name).is_dir():
            yield from (path for path in (folder / name).iterdir() if not SHARD.fullmatch(path.name))
        elif (folder / name).exists():
            yield folder / name


def drop_new(folder: Path) -> None:
    """Delete a cache that was to replace the one in a folder, and is not whole."""
    discard_folder(folder / NEW)


def finish_replacing(folder: Path) -> None:
    """Let the cache in ``.new`` take the place of the one in ``folder``, if it is whole; also after a kill in between.

    Without its index, which goes first and comes last, nobody takes what is there meanwhile for a whole cache.
    """
    new = folder / NEW
    for name in PARTS:
        remove_unfinished_folders(folder, name)
    if not (new / INDEX).is_file():
        return
    (folder / INDEX).unlink(missing_ok=True)
    if (new / DESCRIPTION).is_file():  # moved after the parts, so there is something left to do with them
        info = CacheInfo.read(new)
        for name in PARTS:
            if (new / name).is_dir():
                put_in_place(new / name, folder / name)
            elif getattr(info, name) is None and (folder / name).is_dir():
                remove_folder(folder / name)
        (folder / BROKEN).unlink(missing_ok=True)
    for name in (BROKEN, DESCRIPTION, INDEX):
        if (new / name).is_file():
            (new / name).replace(folder / name)
    new.rmdir()
