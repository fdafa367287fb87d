"""Numbers on the command lines of the smaller tools."""

from opensora.utils.errors import UserError


def check_count(flag: str, value: int | None, least: int) -> None:
    """Raise a UserError for a number that is given and below ``least``."""
    if value is not None and value < least:
        raise UserError(f"{flag} {value}: expected {least} or more")
