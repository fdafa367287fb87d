"""Progress: bars in terminals, lines elsewhere, times in hours and days."""

import io
import logging
import sys

import pytest

from opensora.utils import progress
from opensora.utils.progress import Bar, duration, quiet_libraries


@pytest.fixture
def stderr(monkeypatch):
    """Puts a stream in stderr's place, that is a terminal or not."""

    def terminal(is_one):
        stream = io.StringIO()
        stream.isatty = lambda: is_one
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return terminal


@pytest.fixture
def lines(monkeypatch):
    """What the log of progress says."""
    said: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lambda text, *values: said.append(text % values))
    return said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (3599.9, "1 h"), (18720, "5 h 12 min"),
     (86400 * 2 + 7 * 3600 + 59, "2 d 7 h"), (86400, "1 d"), (float("inf"), "?")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_has_a_bar_with_the_time_left(stderr, lines):
    stream = stderr(True)
    bar = Bar(total=100_000, unit="step", mininterval=0, smoothing=0)
    bar.start_t -= 1000
    bar.update(100)
    bar.refresh()
    assert "100/100000" in stream.getvalue()
    assert "11 d 13 h left" in stream.getvalue()  # a thousandth took 1000 seconds
    bar.close()
    assert not lines


def test_a_file_has_a_line_per_minute(stderr, lines, monkeypatch):
    stream, now = stderr(False), [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    with Bar(total=10, desc="samples", unit="sample", initial=2) as outer, Bar(unit="step", leave=False) as inner:
        for i in range(1, 5):
            now[0] = 25.0 * i
            inner.total = 8
            inner.update(i - inner.n)
            outer.update(1)
    assert lines == ["step 3/8, 1 min 15 s, 2 min 5 s left", "samples: sample 5/10, 1 min 15 s, 2 min 5 s left"]
    assert list(Bar(range(3), disable=True)) == [0, 1, 2]
    taken = []
    for item in Bar(iter("ab"), total=2, unit="clip"):
        taken.append(item)
        now[0] += 61
    assert taken == ["a", "b"]
    assert lines[2:] == ["clip 1/2, 1 min 1 s, 1 min 1 s left", "clip 2/2, 2 min 2 s, 0 s left"]
    assert stream.getvalue() == ""


def test_bars_of_libraries_are_for_terminals_too(stderr):
    transformers_logging = pytest.importorskip("transformers.utils.logging")
    from huggingface_hub.utils import are_progress_bars_disabled

    progress.logger.setLevel(logging.INFO)
    for is_terminal in (False, True):
        stderr(is_terminal)
        with quiet_libraries():
            assert transformers_logging.is_progress_bar_enabled() == is_terminal
            assert are_progress_bars_disabled() != is_terminal
        assert transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
