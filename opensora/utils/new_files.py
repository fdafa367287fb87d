"""Places of files that a command is to write, looked at before its work."""

import argparse
import os
from pathlib import Path

from opensora.utils.errors import UserError
from opensora.utils.files import NAME_BYTES


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    """The flag that lets a tool replace what is there."""
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def check_place(path: Path, flag: str, folder: bool = False) -> None:
    """Raise a UserError where no file (or no ``folder``) can be written, naming the part of the path that is wrong."""
    check_text(path, flag)
    for part in path.parts:
        size = len(os.fsencode(part))
        if size > NAME_BYTES:
            raise UserError(f"{flag} {part[:40]}...: a name of {size} bytes; file systems take {NAME_BYTES}")
    for place in (path, *path.parents):
        if not os.path.lexists(place):
            continue
        inner = place != path
        if not place.exists():
            raise UserError(f"{flag} {path}: {place} is a link that leads nowhere")
        if place.is_dir() and not inner and not folder:
            raise UserError(f"{flag} {path} is a folder; give a file")
        if not place.is_dir() and (inner or folder):
            raise UserError(f"{flag} {path}{f': {place}' if inner else ''} is a file; give a folder")
        holder = place if place.is_dir() else place.parent
        if not os.access(holder, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {path}: {holder} cannot be written to")
        return


def check_text(path: Path, flag: str) -> None:
    """Raise a UserError for a path that is no text that tables and programs could hold."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {os.fsencode(path)!r}: not UTF-8; rename it") from None
    if "\0" in path.as_posix():
        raise UserError(f"{flag} {path.as_posix()!r}: a name cannot hold a zero byte")


def check_new(path: Path, overwrite: bool, flag: str = "--out") -> None:
    """Raise a UserError before long work whose result has no place: something is there, or nothing can be."""
    check_place(path, flag)
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path} exists; give another name, or --overwrite")
