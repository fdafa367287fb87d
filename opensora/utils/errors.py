"""The one exception for what a user can get wrong, the one for SIGTERM, and words for messages."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in a user's command, config, file or data.

    The message says what was wrong, where (file, row, flag) and what would be right. Scripts print it without a
    traceback and exit with status 2; library callers may catch it as a ``ValueError``.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM came. As Ctrl-C it ends the program, whoever catches the errors and exits of code that is not theirs."""


def first_line(error: Exception) -> str:
    """What an error of a library says, without what follows."""
    return next(iter(str(error).splitlines()), "no reason given")


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a long list, for a message."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
