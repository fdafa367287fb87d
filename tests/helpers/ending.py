"""Calls during which a process is told to end."""

from collections.abc import Callable
from typing import Any


def ends_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that is done, and whose first caller never gets what it gives."""
    calls: list[None] = []

    def ending(*arguments: Any, **options: Any) -> Any:
        found = call(*arguments, **options)
        calls.append(None)
        if len(calls) == 1:
            del found
            raise KeyboardInterrupt
        return found

    return ending
