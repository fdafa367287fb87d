"""What the command lines of the tools share: numbers with bounds, values that a function reads."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora.utils.errors import UserError
from opensora.utils.paths import expand_home


def user_path(text: str) -> Path:
    """A path of a command line; ``~`` is the home folder, also in ``--out=~/x``, which shells leave as it is."""
    return expand_home(text)


def names_of(text: str) -> list[str]:
    """Names that commas separate, each of them once.

    Raises:
        UserError: one stands there twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    again = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if again is not None:
        raise UserError(f"{text!r}: '{again}' is named twice")
    return names


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
    """A finite number between ``least`` and ``most``: ``add_argument("--rows", type=int, action=Bounded, least=1)``.

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
        """Take the value or values of one flag."""
        for value in values if isinstance(values, list) else [values]:
            if not value >= self.least:
                raise UserError(f"{option_string} {value}: expected {self.least:g} or more")
            if not value <= (sys.float_info.max if self.most is None else self.most):
                expected = "a finite number" if self.most is None else f"{self.most:g} or less"
                raise UserError(f"{option_string} {value}: expected {expected}")
        setattr(namespace, self.dest, values)
