"""Temporary folders that nobody leaves behind: what a killed program could not delete goes with the next start."""

import fcntl
import multiprocessing.util
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora.utils.claims import FOLDER_LOCK

PREFIX = "opensora-"
SOCKETS_GONE = -100  # when multiprocessing deletes its own, among what is to do at the end
SOCKET_BYTES = 100  # longest name of a socket, a little less than systems take


class TemporaryFolder:
    """An empty folder, gone when the context or this object is; those of programs that were killed go first.

    Args:
        parent: where it is; None takes the system's folder for temporary files.

    Attributes:
        path: of the folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        remove_forgotten(parent)
        whole = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._remove = weakref.finalize(self, _remove, whole, os.getpid())
        self._lock = os.open(whole / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (whole / "lock").rename(whole / FOLDER_LOCK)  # locked before others can see it
        self.path = whole / "files"
        self.path.mkdir()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *ending: object) -> None:
        self._remove()
        os.close(self._lock)


def _remove(whole: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it, to which the object is nothing
        shutil.rmtree(whole, ignore_errors=True)


@contextmanager
def kept_together() -> Iterator[None]:
    """Within it, temporary files of libraries lie in a `TemporaryFolder`; for what is over soon, without threads."""
    with TemporaryFolder() as folder, _temporaries_in(folder):
        yield


@contextmanager
def _temporaries_in(folder: Path) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def keep_sockets() -> None:
    """Let the sockets of multiprocessing, which outlive programs that are killed, lie in a `TemporaryFolder` until this
    process ends. Call it before the first process is started."""
    if "tempdir" in getattr(multiprocessing.current_process(), "_config", {}):  # it has its place already
        return
    with suppress(OSError):  # no room: it will say so itself
        folder = TemporaryFolder()
        if len(os.fsencode(folder.path / "pymp-12345678" / "listener-12345678")) > SOCKET_BYTES:
            return
        with _temporaries_in(folder.path):
            multiprocessing.util.get_temp_dir()  # made once in the life of a process
        folder._remove.detach()  # at the end it would come too early; its lock is held until then
        whole, owner = folder.path.parent, os.getpid()
        multiprocessing.util.Finalize(None, _remove, (whole, owner), exitpriority=SOCKETS_GONE - 1)


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
