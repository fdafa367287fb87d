"""Claims on places that are written to, so that no two programs write to one at the same time.

A claim is a lock of the system on a small file, ``.opensora.lock`` in a folder or ``.<name>.lock`` beside a file, which
says who holds it. The system gives it back when a process ends, however that happens.
"""

import fcntl
import io
import json
import math
import os
import shlex
import socket
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from opensora.utils.ending import surely
from opensora.utils.errors import UserError
from opensora.utils.files import check_name
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

FOLDER_LOCK = ".opensora.lock"
NAMES_LOCK = ".opensora-{}.names"  # of one process: the names that it is about to write in the folder
POLL_SECONDS = 0.2
QUIET_SECONDS = 2  # waiting that is not worth a word


class TakenError(UserError):
    """Another process holds a place."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a claim, and the names that it claims in a folder."""

    pid: int
    host: str
    command: str
    since: str
    names: list[str] = field(default_factory=list)

    @classmethod
    def this(cls, names: Sequence[str] = ()) -> "Holder":
        """This process, now."""
        return cls(os.getpid(), socket.gethostname(), shlex.join(sys.argv), f"{datetime.now():%F %T}", list(names))

    @classmethod
    def read(cls, lock: Path) -> "Holder | None":
        """Who wrote a lock; None if it does not say."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(lock.read_text(encoding="utf-8")))
        return None

    def describe(self) -> str:
        """In words."""
        command = self.command if len(self.command) <= 200 else f"{self.command[:200]} ..."
        return f"process {self.pid} on {self.host} since {self.since}: {command}"


class Claim:
    """A lock that this process holds; processes forked from it do not.

    Args:
        lock: the lock's file, whose folder is there.
        names: see :class:`Holder`.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, lock: Path, names: Sequence[str] = ()) -> None:
        self.lock = lock
        self._file = _lock(lock)
        try:
            with suppress(OSError):  # a full disk: it is a lock all the same
                self._file.truncate(0)
                self._file.write(json.dumps(asdict(Holder.this(names))).encode())
        except BaseException:  # told to end
            self.release()
            raise
        ours = weakref.ref(self)

        def forget() -> None:
            claim = ours()
            if claim is not None:
                claim._forget()

        os.register_at_fork(after_in_child=forget)

    def _forget(self) -> None:
        self._file.close()

    def release(self) -> None:
        """Give the place back; its lock's file goes."""
        surely(self._release)

    def _release(self) -> None:
        if not self._file.closed:
            with suppress(OSError):
                if _is_named(self._file, self.lock):  # it may have been deleted already, and be another's now
                    self.lock.unlink()
            self._forget()


def _lock(path: Path) -> io.FileIO:
    """Open and lock a file that has its name still once it is locked: holders delete it before they let go. A process
    that is told to end meanwhile holds nothing: the file closes itself, which a number of the system would not."""
    while True:
        file = io.FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(file, path):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:  # a file system without locks
            logger.warning("%s: no locks there (%s); do not write to it from two programs at once", path.parent, error)
            return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_named(file: io.FileIO, path: Path) -> bool:
    return path.stat().st_ino == os.fstat(file.fileno()).st_ino


def _forsake(lock: Path) -> None:
    """Remove the file of a lock that nobody holds: this process was told to end while it took it."""
    with suppress(OSError):
        if lock.exists():
            Claim(lock).release()


def lock_of(place: Path, is_folder: bool) -> Path:
    """File of the lock on a place."""
    return place / FOLDER_LOCK if is_folder else place.with_name(f".{place.name}.lock")


def take(place: Path, is_folder: bool = True, wait: bool = False, advice: str = "") -> Claim:
    """Claim a place until :meth:`Claim.release` or the end of this process.

    Args:
        place: folder or file; missing folders are made.
        is_folder: which of them.
        wait: wait for another holder, instead of refusing.
        advice: what else the user might do, for the message.

    Raises:
        TakenError: another process holds it; says which.
    """
    check_name(place)
    lock = lock_of(place, is_folder)
    lock.parent.mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + QUIET_SECONDS
    while True:
        try:
            return Claim(lock)
        except BlockingIOError:
            holder = Holder.read(lock)
            who = holder.describe() if holder else "another process"
            if not wait:
                raise TakenError(f"{place} is in use by {who}{advice and f'; {advice}'}") from None
            if time.monotonic() > patience:
                logger.warning("waiting for %s, in use by %s", place, who)
                patience = math.inf
            time.sleep(POLL_SECONDS)


@contextmanager
def claimed(place: Path, is_folder: bool = True, wait: bool = False, advice: str = "") -> Iterator[None]:
    """Within it, this process holds a place; see :func:`take`. Folders made for that go again if they stay empty."""
    lock, claim = lock_of(place, is_folder), None
    with no_empty_folders(lock.parent):
        try:
            claim = take(place, is_folder, wait, advice)
            yield
        finally:
            if claim is not None:
                claim.release()
            else:
                _forsake(lock)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Within it, a folder and those above it may be made; those that are empty at the end go again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        surely(lambda: _remove_empty(made))


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with suppress(OSError):
            path.rmdir()


class NameClaims:
    """The names that running processes are about to write in a folder. Use it while the folder itself is claimed.

    Those of processes that have ended are forgotten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holders: dict[str, Holder] = {}
        for lock in sorted(folder.glob(NAMES_LOCK.format("*"))):
            holder = self._living(lock)
            if holder is not None:
                self.holders.update(dict.fromkeys(holder.names, holder))

    @staticmethod
    def _living(lock: Path) -> Holder | None:
        try:
            Claim(lock).release()  # nobody held it: its process has ended
        except BlockingIOError:
            return Holder.read(lock)
        except OSError:
            pass
        return None

    def take(self, names: Sequence[str]) -> Claim:
        """Claim names for this process."""
        return Claim(self.folder / NAMES_LOCK.format(f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"), names)
