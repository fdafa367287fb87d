"""Where the pictures about a run go: ``OUTPUT/report``, or a folder of the user's."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.arguments import user_path
from tools.data.engine.own_files import OwnFiles
from tools.outputs import add_overwrite, check_place, write_new

DEFAULT = "report"


def add_report(parser: argparse.ArgumentParser) -> None:
    """Flags of the commands that write pictures."""
    parser.add_argument("--out", type=user_path, help=f"folder for the pictures (default: OUTPUT/{DEFAULT})")
    add_overwrite(parser)


class Report:
    """A folder of pictures about a run.

    Args:
        root: output folder of the run.
        out: folder for the pictures; none takes that of the run, where those of earlier times are replaced.
        overwrite: replace other files as well.

    Raises:
        UserError: there can be no such folder.
    """

    def __init__(self, root: Path, out: Path | None, overwrite: bool) -> None:
        self.folder = out or root / DEFAULT
        self._root, self._given, self._overwrite = root, out is not None, overwrite
        check_place(self.folder, "--out" if out else "OUTPUT", folder=True)

    def write(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Let ``write`` make one file.

        Raises:
            UserError: a file of the user's is there.
        """
        if self._given:
            return write_new(self.folder / name, write, self._overwrite)
        return OwnFiles(self._root, self._overwrite).write(f"{DEFAULT}/{name}", write)
