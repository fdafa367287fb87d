"""Calls during which a process is told to end."""

from collections.abc import Callable
from typing import Any


def ends_once(call: Callable[..., Any], at: int = 0, done: bool = True) -> Callable[..., Any]:
    """A call whose caller never gets what it gives.

    Args:
        at: which of them ends; the others work.
        done: it does what it is to do nevertheless.
    """
    calls: list[None] = []

    def ending(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        ends = len(calls) == at + 1
        if ends and not done:
            raise KeyboardInterrupt
        found = call(*arguments, **options)
        if ends:
            del found
            raise KeyboardInterrupt
        return found

    return ending
