"""Paths as people write them."""

import errno
import os
import re
from pathlib import Path

INDEX_SUFFIX = ".index.json"  # after the name of the weight file that shards stand for
PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = "_data"  # folder of an installed package that holds what a checkout has at its root, see setup.py

PLACED = re.compile(r"(.+)@(-?\d+(?:-(?:-?\d+))?)", re.DOTALL)  # a reference and the frames that it gives


def split_place(entry: str) -> tuple[str, str]:
    """The path (or address) of a reference, and its place in the video: ``a.png@64`` is ``a.png`` and ``64``. The place
    is empty where there is none, and where there is a file of the whole name."""
    found = PLACED.fullmatch(entry.strip())
    return (found[1], found[2]) if found is not None and not is_there(entry) else (entry, "")


def shipped_root() -> Path:
    """The folder that holds ``configs`` and ``assets``: the checkout, or one inside an installed package."""
    return PACKAGE.parent if in_checkout() else PACKAGE / INSTALLED


def in_checkout() -> bool:
    """Whether the package lies in a checkout, with scripts and requirements beside it."""
    return not (PACKAGE / INSTALLED).is_dir()


def own_command(name: str, script: str) -> str:
    """How a user runs a command of the package, for messages: in a checkout by its script, else by its name."""
    return f"python {script}" if in_checkout() else f"opensora {name}"


def expand_home(path: str | Path) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced by the home folder, which a shell does not do after ``=`` and
    in tables; unchanged where there is a file of that very name, or no such user."""
    path = Path(path)
    if not str(path).startswith("~"):
        return path
    try:
        return path if is_there(path) else path.expanduser()
    except (RuntimeError, OSError):
        return path


def is_there(path: str | Path) -> bool:
    """Whether something has this name; no system takes some names, of which pathlib raises errors."""
    return os.path.exists(path)  # noqa: PTH110


def is_at_hand(path: str | Path) -> bool:
    """Whether a file or folder has this name, or shards of weights stand for it."""
    return is_there(path) or is_there(f"{path}{INDEX_SUFFIX}")


def is_folder(path: str | Path) -> bool:
    """Whether a folder has this name, see :func:`is_there`."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """Whether a file has this name, see :func:`is_there`."""
    return os.path.isfile(path)  # noqa: PTH113


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """What is in a text file. A pipe or a device of that name, which may never end, is none.

    Raises:
        OSError: no such file.
    """
    if is_there(path) and not is_file(path):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return Path(path).read_text(encoding=encoding)
