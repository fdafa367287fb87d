"""How wide help texts are."""

import argparse
import shutil
from typing import Any

WIDEST, NARROWEST = 100, 60  # columns


def help_width() -> int:
    """Columns of a help text: those of the terminal, at most 100, which is also the width for files and pipes."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter of ``argparse`` that keeps a description's lines and wraps everything else at :func:`help_width`."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"width": help_width(), **settings})
