"""What the command lines of the tools share: numbers with bounds, values that a function reads."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora.utils.errors import UserError
from opensora.utils.paths import expand_home


def user_path(text: str) -> Path:
    """A path of a command line; ``~`` is the home folder, also in ``--out=~/x``, which shells leave as it is."""
    return expand_home(text)


class Converted(argparse.Action):
    """A value that a function reads: ``add_argument("--shard", action=Converted, convert=shard)``.

    Unlike ``type``, it lets the function's own message through. ``many`` collects the values of a repeated flag.
    """

    def __init__(self, *args: Any, convert: Callable[[str], Any], many: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.convert, self.many = convert, many

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take the value of one flag."""
        value = self.convert(values)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), value] if self.many else value)


class Bounded(argparse.Action):
    """A number between ``least`` and ``most``: ``add_argument("--rows", type=int, action=Bounded, least=1)``.

    Raises:
        UserError: a number out of its range, when the command line is read.
    """

    def __init__(self, *args: Any, least: float, most: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.least, self.most = least, most

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take the value of one flag."""
        if not values >= self.least:
            raise UserError(f"{option_string} {values}: expected {self.least:g} or more")
        if self.most is not None and not values <= self.most:
            raise UserError(f"{option_string} {values}: expected {self.most:g} or less")
        setattr(namespace, self.dest, values)
