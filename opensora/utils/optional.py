"""Packages that not everybody has: imported where they are chosen, and nowhere else."""

import importlib
import importlib.util
import logging
from typing import Any

from opensora.utils.errors import UserError

BITSANDBYTES = "bitsandbytes"
BITSANDBYTES_HINT = "`pip install bitsandbytes`"
OPENAI_HINT = "`pip install openai`"
PEFT_HINT = "`pip install peft`"


def check_module(module: str, wanted_by: str, hint: str) -> None:
    """See that an optional module is installed, without importing it.

    Raises:
        UserError: it is not; says who asked for it, and how to get it.
    """
    if importlib.util.find_spec(module) is None:
        raise _needed(module, wanted_by, "is not installed", hint)


def require(module: str, wanted_by: str, hint: str) -> Any:
    """Import an optional module.

    Raises:
        UserError: it is not installed, or broken; says who asked for it, and how to get it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken binary raises OSError or RuntimeError as often as ImportError
        raise _needed(module, wanted_by, f"cannot be imported here ({error})", hint) from error


def import_bitsandbytes() -> Any:
    """The module, which takes seconds; it warns of a kernel for CPUs that nothing here uses, and is told not to."""
    log = logging.getLogger(BITSANDBYTES)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module(BITSANDBYTES)
    finally:
        log.setLevel(level)


def _needed(module: str, wanted_by: str, wrong: str, hint: str) -> UserError:
    return UserError(f"{wanted_by} needs the module {module.split('.')[0]}, which {wrong}. To get it: {hint}.")
