"""Ending a run on request: SIGTERM is noted, and the loop saves and leaves at the end of its step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from opensora.utils.logging import get_logger

logger = get_logger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM  # 143, what shells report of a program that SIGTERM ended


class StopRequest:
    """Within it, the first SIGTERM sets ``requested``; a second one ends the program as usual.

    Outside the main thread, where Python has no signal handlers, it does nothing.

    Args:
        launched: torchrun started this process. It passes on the SIGTERM that it gets, and schedulers send theirs to
            all processes, so one request comes twice: then no further one changes anything. torchrun kills what does
            not end in time.
    """

    def __init__(self, launched: bool = False) -> None:
        self.requested = False
        self._launched = launched
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._launched:
            if not self.requested:
                logger.warning("SIGTERM: the run saves and ends after this step")
        else:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
            logger.warning("SIGTERM: the run saves and ends after this step (once more ends it now)")
        self.requested = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
