"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """A mistake in a user's command, config, file or data.

    The message says what was wrong, where (file, row, flag) and what would be right. Scripts print it without a
    traceback and exit with status 2; library callers may catch it as a ``ValueError``.
    """
