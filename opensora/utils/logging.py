"""One rank-aware logger for the whole package."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

ROOT_LOGGER = "opensora"
FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
# PEFT and ColossalAI import bitsandbytes where it is installed; on a CPU it then warns that it has no kernel for 4-bit
# weights, which nothing here uses.
ONLY_ERRORS = ("bitsandbytes.backends.cpu.ops",)


class LogFile(logging.FileHandler):
    """A log file. A disk that takes nothing more costs it lines, which is said once."""

    has_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that a line is lost."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_told:
            self.has_told = True
            print(f"warning: {self.baseFilename}: {error.strerror}; it lacks lines", file=sys.stderr)

    def close(self) -> None:
        """Close it, also where what is left to write has no room."""
        with suppress(OSError):
            super().close()


def get_logger(name: str = ROOT_LOGGER) -> logging.Logger:
    """Logger of a module. All of them hang below ``opensora`` and share its handlers and level."""
    return logging.getLogger(name if name.startswith(ROOT_LOGGER) else f"{ROOT_LOGGER}.{name}")


def setup_logging(log_file: str | Path | None = None, level: int = logging.INFO, rank: int = 0) -> logging.Logger:
    """Send the package's log to stderr and, if given, to ``log_file``; ranks other than 0 only show warnings.

    What other packages say stays as it is, except for needless warnings (`ONLY_ERRORS`).

    Args:
        log_file: file to append to (rank 0 only), its folder must exist.
        level: threshold on rank 0.
        rank: of this process among all.
    """
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False
    for name in ONLY_ERRORS:
        logging.getLogger(name).setLevel(logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None and rank == 0:
        handlers.append(LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
    return logger
