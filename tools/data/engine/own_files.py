"""Which files of an output folder these tools wrote, so that a run replaces those and nothing of the user's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside, write_text
from opensora.utils.logging import get_logger
from tools.data.engine.funnel import FUNNEL_FILE, read_funnel
from tools.data.engine.stage import digest_weights
from tools.outputs import check_place

logger = get_logger(__name__)

NOTE = ".written.json"
REMEMBERED = 2  # contents per file: a kill leaves either the one before or the new one


class OwnFiles:
    """What was written into an output folder, by name and content (``.written.json`` there).

    Args:
        root: output folder of a run.
        overwrite: take files of others for one's own.
    """

    def __init__(self, root: Path, overwrite: bool = False) -> None:
        self.root, self.overwrite = root, overwrite

    def claim(self, *names: str) -> None:
        """Raise a UserError for the first name that belongs to a file of the user's, or that nothing can be written to.

        A file that was changed since it was written is the user's.
        """
        written = self._read()
        for name in names:
            path = self.root / name
            check_place(path, "--output")
            if not path.exists() or self.overwrite:
                continue
            if name not in written:
                raise UserError(f"{path} was not written by these tools; give another --output, or --overwrite")
            if digest_weights(path) not in written[name]:
                raise UserError(
                    f"{path} is not as it was written (changed, or damaged); move it away, or give --overwrite"
                )

    def write(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Write a file whole or not at all, and note that it is ours.

        Raises:
            UserError: a file of the user's is there.
        """

        def fill(temporary: Path) -> None:
            write(temporary)
            self._note(name, digest_weights(temporary))

        with claimed(self.root / NOTE, is_folder=False, wait=True):
            self.claim(name)
            return write_beside(self.root / name, fill)

    def write_text(self, name: str, text: str) -> Path:
        """The same for a text."""
        return self.write(name, lambda path: path.write_text(text, "utf-8"))

    def _note(self, name: str, content: str) -> None:
        written = self._read()
        written[name] = [*(c for c in written.get(name, ()) if c != content), content][-REMEMBERED:]
        write_text(json.dumps(written, indent=2, sort_keys=True), self.root / NOTE)

    def _read(self) -> dict[str, list[str]]:
        try:
            written = json.loads((self.root / NOTE).read_text("utf-8"))
            return {str(name): [str(content) for content in contents] for name, contents in written.items()}
        except FileNotFoundError:
            return self._written_before_notes()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("%s is damaged (%s); a new one is begun", self.root / NOTE, error)
            return self._written_before_notes()

    def _written_before_notes(self) -> dict[str, list[str]]:
        """What a run left that has no note, as those of earlier versions of these tools, but a funnel."""
        try:
            read_funnel(self.root)
        except UserError:
            return {}
        found = [
            path for pattern in ("*.parquet", "*.csv", FUNNEL_FILE, "report/*") for path in self.root.glob(pattern)
        ]
        return {p.relative_to(self.root).as_posix(): [digest_weights(p)] for p in found if p.is_file()}
