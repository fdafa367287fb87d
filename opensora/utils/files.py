"""Files and folders that are written whole or not at all, and what killed programs leave of them.

While a file is written it is called ``.unfinished-*`` and lies beside its place; a folder is called
``.<name>.writing``. Both are renamed once they are complete.
"""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from opensora.utils.ending import surely
from opensora.utils.errors import UserError
from opensora.utils.paths import is_there

UNFINISHED = ".unfinished-"  # start of the names that files have while they are written
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what disks say while they are written to
NAME_BYTES = 255  # longest name that file systems take


def check_name(path: str | Path) -> None:
    """Raise a UserError if the last part of a path is longer than file systems allow, or can be no name at all."""
    if "\0" in os.fspath(path):
        raise UserError(f"{str(path)!r}: a name cannot hold a zero byte")
    length = len(os.fsencode(Path(path).name))
    if length > NAME_BYTES:
        raise UserError(f"{path}: the name has {length} bytes, file systems take {NAME_BYTES}; choose a shorter one")


def check_new(path: str | Path) -> None:
    """:func:`check_name` of something that is to be made, which ``.`` and the like are not; nor is what is no path."""
    if not isinstance(path, str | os.PathLike) or not Path(path).name:
        raise UserError(f"{path!r} is no name of a file or folder")
    check_name(path)


class FileBeside:
    """A temporary file beside ``path`` that gets its name once it is complete, so that ``path`` is whole or absent.

    The temporary name keeps the ending of ``path``, since codecs choose their container by it. Missing parent folders
    are created. What a killed program leaves is for :func:`remove_unfinished_files`.

    Attributes:
        path: where the file will be.
        temporary: where it is written; empty at first.

    Raises:
        UserError: the name is too long, or that of a link that leads nowhere.
    """

    def __init__(self, path: str | Path) -> None:
        check_new(path)
        self.path = Path(path)
        if self.path.is_symlink() and not is_there(self.path):
            raise UserError(f"{self.path} is a link that leads nowhere; delete it, or give another place")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file, self.temporary = _open_beside(self.path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        except BaseException:  # told to end
            _forsake(_steady_name(self.path))
            raise

    def put_in_place(self) -> Path:
        """Give the file its name, in place of one that has it."""
        self.temporary.chmod(0o666 & ~_umask())
        self.temporary.replace(self.path)
        self._file.close()
        return self.path

    def discard(self) -> None:
        """Delete the temporary file, if it is still there."""
        surely(self._discard)

    def _discard(self) -> None:
        if not self._file.closed:  # the name may be another's afterwards
            self.temporary.unlink(missing_ok=True)
            self._file.close()


def _steady_name(path: Path) -> Path:
    return path.with_name(f"{UNFINISHED}{zlib.crc32(os.fsencode(path.name)):08x}{path.suffix}")


def _open_beside(path: Path) -> tuple[io.FileIO, Path]:
    """An empty temporary file beside ``path``, open and locked, and its name.

    The name is the same every time, so that the next run writes over what a killed one has left; another one if
    somebody is writing the same file now.
    """
    steady = _steady_name(path)
    try:
        file = _open(steady, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        file = _open(steady, os.O_NOFOLLOW)
    try:
        if _is_ours_alone(file, steady):
            file.truncate(0)
            return file, steady
    except OSError:  # somebody's, gone meanwhile, or on a file system without locks
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    handle, name = tempfile.mkstemp(prefix=UNFINISHED, suffix=path.suffix, dir=path.parent)
    return io.FileIO(handle, "r+"), Path(name)


def _open(path: Path, flags: int) -> io.FileIO:
    """An open file that closes itself if its opener is told to end, so that its lock goes."""
    return io.FileIO(path, "r+", opener=lambda name, given: os.open(name, given | flags, 0o600))


def _is_ours_alone(file: io.FileIO, path: Path) -> bool:
    """Whether nobody else has locked a file, which has its name still and belongs to this user; locks it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ours, there = os.fstat(file.fileno()), path.lstat()
    return ours.st_ino == there.st_ino and ours.st_uid == os.geteuid()


def _forsake(path: Path) -> None:
    """Delete an empty file that this process was about to write, unless somebody else does."""
    with suppress(OSError), _open(path, os.O_NOFOLLOW) as file:
        if _is_ours_alone(file, path) and path.stat().st_size == 0:
            path.unlink()


def write_beside(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it, see :class:`FileBeside`.

    Raises:
        UserError: the name is too long, or that of a link that leads nowhere.
    """
    file = FileBeside(path)
    try:
        write(file.temporary)
        return file.put_in_place()
    except BaseException as error:
        file.discard()
        told, temporary = str(error), str(file.temporary)
        if isinstance(error, UserError) and temporary in told:  # nobody is to hear of that name
            raise UserError(told.replace(temporary, str(path))) from error
        number = error.errno if _is_about(error, file.temporary) else nameless_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _is_about(error: BaseException, path: Path) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and str(path) in (str(error.filename), str(error.filename2))


def nameless_error(error: BaseException) -> int | None:
    """The number of an error of a disk that takes nothing more, if it does not name a file; None of other errors.

    Libraries written in Rust (safetensors, polars) have it in their text alone.
    """
    if isinstance(error, UserError) or getattr(error, "filename", None):
        return None
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(said[1]) if said else None
    return number if number in REFUSED else None


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Within it, errors of a disk that takes nothing more name this place, unless they name a file."""
    try:
        yield
    except Exception as error:
        number = nameless_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(text: str, path: str | Path) -> Path:
    """Write a UTF-8 text file, whole or not at all. Bytes of file names that are not UTF-8 are escaped, as in JSON: no
    work of hours is lost for the name of a folder."""
    return write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(content: Any, path: str | Path) -> Path:
    """Write a JSON file, indented by 4, whole or not at all."""
    return write_text(json.dumps(content, indent=4), path)


def flush(file: Path) -> None:
    """Have the system write a file out, so that a machine that goes down does not leave an empty one."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished_files(folder: Path, *further: str) -> None:
    """Delete what killed programs were writing with :func:`write_beside` in a folder or below it, where no other
    program is at work (see :mod:`opensora.utils.claims`); ``further`` are patterns of what is to go as well."""
    for pattern in (f"{UNFINISHED}*", *further):
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- folders


def temporary_path(folder: Path, doing: str) -> Path:
    """Where a folder is while something is done to it: ``writing``, ``replacing`` or ``removing``."""
    return folder.with_name(f".{folder.name}.{doing}")


def place_in_words(path: str | bytes | os.PathLike) -> str:
    """A path for a message: in a folder that is being written, that of the folder once it is there."""
    return re.sub(r"(?<![^/])\.([^/]+)\.writing(?![^/])", r"\1", os.fsdecode(path))


def put_in_place(written: Path, folder: Path) -> None:
    """Give a written folder its name, in the place of one that has it already, which is deleted last."""
    old = temporary_path(folder, "replacing")
    try:
        if folder.exists():
            _set_aside(folder, "replacing")
        written.rename(folder)
    finally:  # also where that was refused, or this process told to end
        surely(lambda: _settle(old, folder))


def _settle(old: Path, folder: Path) -> None:
    """Give a folder that was set aside its name back if nothing has taken it; else delete it."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Take a folder's name from it, then delete its files one by one: one that has its name is whole.

    What of these cannot be deleted (held open on a network disk) is left to :func:`remove_unfinished_folders`.
    """
    discard_folder(_set_aside(folder, "removing"))


def discard_folder(folder: Path) -> None:
    """Delete all that can be of a folder that nobody takes for a whole one, or nothing where there is none."""
    surely(lambda: shutil.rmtree(folder, ignore_errors=True))


def _set_aside(folder: Path, doing: str) -> Path:
    aside = temporary_path(folder, doing)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def remove_unfinished_folders(parent: Path, pattern: str) -> None:
    """Finish what a killed program was doing to the folders of ``parent`` whose names match ``pattern``: what was being
    written or removed is deleted; what was about to be replaced gets its name back if nothing has taken it."""
    for old in parent.glob(f".{pattern}.replacing"):
        folder = old.with_name(old.name[1:].removesuffix(".replacing"))
        if not folder.exists():
            old.rename(folder)
    for doing in ("writing", "removing", "replacing"):
        for path in parent.glob(f".{pattern}.{doing}"):
            shutil.rmtree(path, ignore_errors=True)
