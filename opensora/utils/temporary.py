"""Temporary folders that nobody leaves behind: what a killed program could not delete goes with the next start."""

import fcntl
import multiprocessing.util
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from opensora.utils.ending import surely
from opensora.utils.files import nameless_error

PREFIX, TOKEN_BYTES = "opensora-", 6
OWN_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{{2 * TOKEN_BYTES}}}")
LOCK, FILES = ".temporary.lock", "files"  # in it
MOMENT, POLL = 1.0, 0.002  # seconds
LITTLE = 2**20  # bytes that are left of a full disk, at most
SOCKETS_GONE = -100  # when multiprocessing deletes its own, among what is to do at the end
SOCKET_BYTES = 100  # longest name of a socket, a little less than systems take


class TemporaryFolder:
    """An empty folder, gone when the context or this object is; those of programs that were killed go first.

    Within the context, errors that name no file are about ``parent`` where its disk is full.

    Args:
        parent: where it is; None takes the system's folder for temporary files.

    Attributes:
        path: of the folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        remove_forgotten(parent)
        whole = parent / f"{PREFIX}{secrets.token_hex(TOKEN_BYTES)}"
        self._remove = weakref.finalize(
            self, _remove, whole, os.getpid()
        )  # first, since a signal may come after any line
        try:
            with _held(parent, fcntl.LOCK_SH):
                whole.mkdir(0o700)
                self._lock = os.open(whole / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.path = whole / FILES
            self.path.mkdir()
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        number = None if error is None else nameless_error(error)
        is_ours = number is not None and shutil.disk_usage(self.path.parents[1]).free < LITTLE
        self._remove()
        os.close(self._lock)
        if number is not None and is_ours:
            raise OSError(number, os.strerror(number), str(self.path.parents[1])) from error


def _remove(whole: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it, to which the object is nothing
        _delete(whole)


def _delete(whole: Path) -> None:
    def delete() -> None:
        shutil.rmtree(whole / FILES, ignore_errors=True)  # before its lock, so that what is left of it is known
        shutil.rmtree(whole, ignore_errors=True)

    surely(delete)


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
    with ExitStack() as held:
        with _held(parent, fcntl.LOCK_EX) as alone:  # nobody is making one
            dead = [folder for folder in parent.glob(f"{PREFIX}*") if alone and _is_dead(folder, held)]
        for folder in dead:
            _delete(folder)


def _is_dead(folder: Path, held: ExitStack) -> bool:
    """Whether a folder is one of `TemporaryFolder` whose program has ended; its lock, if it has one, is held then."""
    if OWN_NAME.fullmatch(folder.name) is None:
        return False
    with suppress(OSError):  # no folder, another user's, or a living program's
        inside = {path.name for path in folder.iterdir()}
        if LOCK in inside and inside <= {LOCK, FILES}:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return not inside and folder.lstat().st_uid == os.geteuid()  # it was killed before the lock, or after it
    return False


@contextmanager
def _held(folder: Path, how: int) -> Iterator[bool]:
    """Within it, this process has a lock on a folder (shared or not) if that can be had in a moment; tells whether."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        yield _soon_locked(handle, how)
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do if this process was forked meanwhile
        os.close(handle)


def _soon_locked(handle: int, how: int) -> bool:
    patience = time.monotonic() + MOMENT
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() > patience:
                return False
        time.sleep(POLL)
