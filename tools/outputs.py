"""Where the tools write: nothing that is there is replaced unless ``--overwrite`` says so, and no input ever is."""

import errno
import filecmp
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opensora.utils.claims import FOLDER_LOCK, claimed
from opensora.utils.errors import UserError
from opensora.utils.files import UNFINISHED, write_beside
from opensora.utils.new_files import add_overwrite, check_new, check_place, check_text

__all__ = ["add_overwrite", "check_new", "check_no_input", "check_place", "check_text", "is_new", "write_new"]


def is_new(folder: Path) -> bool:
    """Whether a folder is not there, or holds nothing but what a killed program left of a file and a lock."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return all(name == FOLDER_LOCK or name.startswith(UNFINISHED) for name in names)


def check_no_input(path: Path, inputs: Iterable[Path], flag: str = "--out") -> None:
    """Raise a UserError for an output that is one of the inputs, under whatever name."""
    for other in inputs:
        if path.exists() and other.exists() and path.samefile(other):
            raise UserError(f"{flag} {path} is the input {other}, which is never replaced; give another name")


def write_new(path: Path, write: Callable[[Path], Any], overwrite: bool = False, flag: str = "--out") -> Path:
    """Write a file whole or not at all (``write_beside``), unless there is another one. One that is there and the same
    does no harm, so that a command may be given twice, also at once.

    Raises:
        UserError: something else is there and ``overwrite`` is off; or nothing can be written there.
    """
    check_place(path, flag)

    def fill(temporary: Path) -> None:
        write(temporary)
        if path.exists() and not overwrite and not filecmp.cmp(temporary, path, shallow=False):
            raise UserError(f"{flag} {path} exists and holds something else; give another name, or --overwrite")

    try:
        with claimed(path, is_folder=False, wait=True):
            return write_beside(path, fill)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise UserError(f"{flag} {path}: {error.strerror}") from error
        raise
