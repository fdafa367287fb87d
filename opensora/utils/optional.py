"""bitsandbytes, which is imported where it is chosen, and nowhere else."""

import importlib
import importlib.util
import logging
from typing import Any

from opensora.utils.errors import UserError

BITSANDBYTES = "bitsandbytes"
BITSANDBYTES_HINT = "`pip install bitsandbytes`"


def check_module(module: str, wanted_by: str, hint: str) -> None:
    """See that an optional module is installed, without importing it.

    Raises:
        UserError: it is not; says who asked for it, and how to get it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{wanted_by} needs the module {module}, which is not installed. To get it: {hint}.")


def import_bitsandbytes() -> Any:
    """The module, which takes seconds; it warns of a kernel for CPUs that nothing here uses, and is told not to."""
    log = logging.getLogger(BITSANDBYTES)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module(BITSANDBYTES)
    finally:
        log.setLevel(level)
