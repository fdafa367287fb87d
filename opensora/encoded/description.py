"""The file beside encoded data that says what it was made with: a dataclass as JSON, with a version."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from opensora.utils.errors import UserError, first_line
from opensora.utils.paths import read_text

Info = TypeVar("Info")


def read_description(kind: Callable[..., Info], version: int, file: Path, what: str, written_by: str) -> Info:
    """Read such a file.

    Args:
        kind: of what it holds, made of its keys.
        version: that this program reads.
        file: where it is.
        what: the encoded data, in words.
        written_by: the command that makes them.

    Raises:
        UserError: not there, of another version, or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file.parent} holds no {what} (no {file.name}), which {written_by} CONFIG writes")
    try:
        content = json.loads(read_text(file))
        if content.get("version") == version:
            return kind(**content)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from error
    raise UserError(f"{file.parent}: {what} of version {content.get('version')}, this program reads {version}")
