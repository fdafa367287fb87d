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
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        logger.warning("SIGTERM: the run saves and ends after this step (once more ends it now)")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
