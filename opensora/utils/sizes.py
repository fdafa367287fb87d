"""Amounts of memory as people write and read them."""

import re
from typing import overload

from opensora.utils.errors import UserError

UNITS = {"": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)")


@overload
def parse_bytes(text: str, key: str) -> int: ...
@overload
def parse_bytes(text: str | None, key: str) -> int | None: ...
def parse_bytes(text: str | None, key: str) -> int | None:
    """Bytes of an amount such as ``16GB``, ``15.5GiB``, ``800 MB``; a number alone is in GB (10^9 bytes). None of None.

    Args:
        text: the amount.
        key: where it stands, for the message.

    Raises:
        UserError: it is none, or nothing.
    """
    if text is None:
        return None
    found = AMOUNT.fullmatch(text.strip())
    unit = found and UNITS.get(found[2].upper() if found[2] not in ("K", "M", "G") else found[2] + "B")
    count = int(float(found[1]) * unit) if found and unit else 0
    if not count:
        raise UserError(f"{key}={text}: give an amount of memory above 0, such as 16GB, 15.5GiB or 800MB")
    return count


def size_text(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def seconds_text(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 1:
        return f"{seconds:.1g} s" if seconds < 0.095 else f"{seconds:.1f} s"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s" if seconds < 1000 else f"{seconds / 60:.0f} min"


def gib(count: float) -> str:
    """Bytes as GiB, with a digit after the point."""
    return f"{count / 2**30:.1f}" if count >= 0.05 * 2**30 else f"{count / 2**30:.2g}"
