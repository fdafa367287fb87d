"""Temporary folders that nobody leaves behind: what a killed program could not delete goes with the next start."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from opensora.utils.claims import FOLDER_LOCK

PREFIX = "opensora-"


class TemporaryFolder:
    """An empty folder, gone when the context or this object is; those of programs that were killed go first.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        remove_forgotten(Path(tempfile.gettempdir()))
        self._whole = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        whole = Path(self._whole.name)
        self._lock = os.open(whole / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (whole / "lock").rename(whole / FOLDER_LOCK)  # locked before others can see it
        self.path = whole / "files"
        self.path.mkdir()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *ending: object) -> None:
        self._whole.cleanup()
        os.close(self._lock)


def remove_forgotten(parent: Path) -> None:
    """Delete the folders of `TemporaryFolder` whose programs have ended."""
    for lock in parent.glob(f"{PREFIX}*/{FOLDER_LOCK}"):
        with suppress(OSError):  # another user's
            handle = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: a living program's
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(handle)
