"""Where the tools write: nothing that is there is replaced unless ``--overwrite`` says so, and no input ever is."""

import errno
import filecmp
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opensora.utils.claims import FOLDER_LOCK, claimed
from opensora.utils.errors import UserError
from opensora.utils.files import UNFINISHED, remove_unfinished_files, write_beside, write_text
from opensora.utils.new_files import add_overwrite, check_new, check_place, check_text

__all__ = [
    "add_overwrite",
    "check_new",
    "check_no_input",
    "check_place",
    "check_text",
    "is_new",
    "new_folder",
    "write_new",
]

BEGUN = ".opensora-begun"  # in a folder that is being filled: by which tool


def is_new(folder: Path) -> bool:
    """Whether a folder is not there, or holds nothing but what a killed program left of a file and a lock."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return all(name in (FOLDER_LOCK, BEGUN) or name.startswith(UNFINISHED) for name in names)


@contextmanager
def new_folder(folder: Path, tool: str, flag: str = "--out") -> Iterator[None]:
    """Within it, a tool fills a folder that is not there or empty, or that a run of it has left half full: then it
    writes over its own files. Two of them at once do not meet there.

    Args:
        folder: missing ones are made, and go again if they stay empty.
        tool: its name.
        flag: for messages.

    Raises:
        UserError: there is something else in the folder, or another process is at work there.
    """
    check_place(folder, flag, folder=True)
    with claimed(folder, advice=f"wait for it or give another {flag}"):
        note = folder / BEGUN
        if not is_new(folder) and not _is_begun(note, tool):
            raise UserError(f"{flag} {folder} exists and is not an empty folder; give a new one")
        remove_unfinished_files(folder)
        try:
            write_text(tool, note)
            yield
            note.unlink()
        finally:
            if is_new(folder):  # it has made nothing
                with suppress(OSError):
                    note.unlink()


def _is_begun(note: Path, tool: str) -> bool:
    with suppress(OSError, UnicodeDecodeError):
        return note.read_text(encoding="utf-8") == tool
    return False


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
