"""Progress: a bar in a terminal, a line of the log per minute in files and everywhere else."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from tqdm import tqdm

from opensora.utils.logging import get_logger

SECONDS_PER_LINE = 60.0
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {left} left, {rate_fmt}{postfix}]"
logger = get_logger(__name__)


def duration(seconds: float) -> str:
    """A time for people in its two largest units: ``40 s``, ``3 min 20 s``, ``5 h 12 min``, ``2 d 7 h``."""
    if not math.isfinite(seconds):
        return "?"
    left = max(round(seconds), 0)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next((place for place, (_, size) in enumerate(units) if left >= size), len(units) - 1)
    words: list[str] = []
    for name, size in units[first : first + 2]:
        count, left = divmod(left, size)
        if count or not words:
            words.append(f"{count} {name}")
    return " ".join(words)


def in_terminal() -> bool:
    """Whether somebody looks at what is written to stderr as it comes."""
    return sys.stderr.isatty()


class Bar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar with the time left in hours and days; without a terminal a line of the log per minute.

    Args:
        *args: of tqdm.
        disable: show nothing anywhere.
        lines: write lines where there is no terminal.
        **kwargs: of tqdm.
    """

    def __init__(self, *args: Any, disable: bool = False, lines: bool = True, **kwargs: Any) -> None:
        self.lines = lines and not disable and not in_terminal()
        self.label = " ".join(filter(None, (f"{kwargs['desc']}:" if kwargs.get("desc") else "", kwargs.get("unit"))))
        self.began = self.said = monotonic()
        kwargs.setdefault("bar_format", FORMAT)
        super().__init__(*args, disable=disable or not in_terminal(), **kwargs)
        self.first = self.n

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's, and the time left."""
        found = super().format_dict
        rate = found["rate"] or (found["n"] - found["initial"]) / (found["elapsed"] or math.inf)
        return {**found, "left": duration((found["total"] - found["n"]) / rate) if rate and found["total"] else "?"}

    def __iter__(self) -> Iterator[Any]:
        """The items; each counts once."""
        if not self.lines:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more."""
        if not self.lines:
            return super().update(n)
        self.n += n or 0
        now = monotonic()
        if now - self.said >= SECONDS_PER_LINE:
            self.said = now
            logger.info("%s", self._line(now - self.began))
        return None

    def _line(self, seconds: float) -> str:
        done = self.n - self.first
        if not self.total:
            return f"{self.label} {self.n:g}, {duration(seconds)}"
        left = duration(seconds / done * (self.total - self.n)) if done > 0 else "?"
        return f"{self.label} {self.n:g}/{self.total:g}, {duration(seconds)}, {left} left"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Bars of transformers and the hub, such as "Loading weights", only in a terminal and at the first process."""
    from huggingface_hub import utils as hub

    if in_terminal() and logger.isEnabledFor(logging.INFO):
        yield
        return
    theirs: Any = sys.modules.get("transformers.utils.logging")  # bars of their own, where transformers is at work
    hidden, shown = hub.are_progress_bars_disabled(), theirs is not None and theirs.is_progress_bar_enabled()
    hub.disable_progress_bars()
    if shown:
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
        if not hidden:
            hub.enable_progress_bars()
