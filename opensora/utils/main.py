"""How a command ends: with one line for its user, whatever happens, and an exit status that tells the kind of end.

2 is the user's mistake (or a place that cannot be read or written), 70 an unexpected error, 74 a standard output
that takes nothing more, 130 Ctrl-C, 141 a reader of the output that has gone, 143 SIGTERM.
"""

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from opensora.utils.errors import Terminated, UserError
from opensora.utils.files import nameless_error, place_in_words

MISTAKE, UNFORESEEN, OUTPUT_FULL, INTERRUPTED, NO_READER, TERMINATED = 2, 70, 74, 130, 141, 143
LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun
DEBUG_FLAG = "--debug"
# what the system says of a place that a user chose: not there, not allowed, not a folder, too long a name, full
PLACES = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
FULL = (errno.ENOSPC, errno.EDQUOT)


def run_main(main: Callable[[list[str] | None], Any]) -> None:
    """Run a script's ``main``; no traceback reaches the user.

    An unexpected error becomes a line that says what was being done (see :func:`doing`) and where its traceback
    lies; the word ``--debug`` on the command line shows it instead.

    Raises:
        SystemExit: unless all went well; see the module for its statuses.
    """
    debug = DEBUG_FLAG in sys.argv[1:]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != DEBUG_FLAG)]
    if not debug:
        threading.excepthook = _tell_of_thread
    try:
        _end_in_order_at_sigterm()
        try:
            main(None)
        finally:
            sys.stdout.flush()  # what is left in it would fail after the last line here
    except Terminated:
        _end(None, TERMINATED)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        _end(*_ending(error, debug))


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A line about a library's thread that has ended with an error; what waits for it finds out by itself."""
    if isinstance(failed.exc_value, Exception) and sys.stderr is not None:
        name = failed.thread.name if failed.thread is not None else "a thread"
        print(f"warning: {name} has ended: {told_of(failed.exc_value)}", file=sys.stderr, flush=True)


def _end_in_order_at_sigterm() -> None:
    """Let SIGTERM end this process as an error does, so that nothing unfinished stays; a second one ends it at once.

    Not where torchrun has started it: a rank may wait in the system's code for others, and would never hear of it.
    """
    ours = os.getpid()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or LAUNCHED in os.environ or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != ours:  # a process that was forked from this one
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def _ending(error: Exception, debug: bool) -> tuple[str | None, int]:
    """The last line of a command (None: nothing to say) and its exit status."""
    if _is_of_stdout(error):
        gone = isinstance(error, BrokenPipeError)
        return (None, NO_READER) if gone else (f"error: standard output: {os.strerror(_number(error))}", OUTPUT_FULL)
    if isinstance(error, UserError):
        return f"error: {_indented(_message(error))}", MISTAKE
    if _is_of_place(error) or nameless_error(error) in FULL:
        return f"error: {told_of(error)}", MISTAKE
    kept = "" if debug else f"; the traceback is in {_keep_traceback(error)}, {DEBUG_FLAG} shows it"
    return f"error: {told_of(error)}{kept}", UNFORESEEN


def _indented(message: str) -> str:
    """A message whose further lines can be told from those of others."""
    first, *further = [line.rstrip() for line in message.splitlines() if line.strip()] or [""]
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in further)])


def _is_of_place(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in PLACES and bool(error.filename or error.errno in FULL)


def told_of(error: Exception) -> str:
    """What a command tells of an error in its last line: what was being done, and what went wrong."""
    if isinstance(error, UserError):
        return _message(error)
    told = "".join(f"{what}: " for what in _doing_of(error))
    if isinstance(error, OSError) and _is_of_place(error):
        return f"{told}{_place_of(error)}{error.strerror}"
    return f"{told}{type(error).__name__}: {_message(error).splitlines()[0]}"


def _place_of(error: OSError) -> str:
    """The place that an error is about; of a copy to a full disk that is where it goes."""
    place = error.filename2 if error.errno in FULL and error.filename2 else error.filename
    return f"{place_in_words(place)}: " if isinstance(place, str | bytes | os.PathLike) else ""


def _message(error: Exception) -> str:
    """What an error says; of one that torch carried over from a reader of clips, what it said there."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return text or "no reason given"


def _number(error: Exception) -> int:
    return getattr(error, "errno", None) or errno.EIO


def _is_of_stdout(error: Exception) -> bool:
    """Whether an error is one of writing to standard output: a further line cannot be written either."""
    if not isinstance(error, OSError) or error.filename or error.errno not in (*FULL, errno.EPIPE, errno.EIO):
        return False
    try:
        print(flush=True)
    except OSError:
        with suppress(OSError), Path(os.devnull).open("w") as nowhere:  # for the interpreter's own last flush
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return True
    return False


def _end(line: str | None, status: int) -> None:
    with suppress(OSError):
        if line is not None:
            print(line, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def _keep_traceback(error: Exception) -> Path | str:
    """Write the traceback to a file of the temporary folder."""
    try:
        handle, name = tempfile.mkstemp(prefix="opensora-", suffix=".traceback.txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{' '.join(sys.argv)}\n\n")
            traceback.print_exception(error, file=file)
    except OSError as reason:
        return f"no file ({reason.strerror})"
    return Path(name)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Within it, unexpected errors remember what was being done, for the last line of the command.

    Args:
        what: in words, with the file or row, e.g. ``"clips.csv, row 7"``.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            with suppress(AttributeError):  # an error without room for it
                error.opensora_doing = (what, *_doing_of(error))  # type: ignore[attr-defined]
        raise


def _doing_of(error: BaseException) -> tuple[str, ...]:
    return getattr(error, "opensora_doing", ())
