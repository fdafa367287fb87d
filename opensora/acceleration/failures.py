"""Errors of runs with several processes: said once, and the end of one is the end of all.

torchrun ends all processes when one fails. What is left to do is that they do not all print the same: a mistake in a
config is found by every process, and a process that dies makes the others fail in whatever exchange they wait in.

torchrun then reports every process that failed, with what it finds in the file that it names to each. The process that
has the error writes its line there; the others are not among them if torchrun ends them before they end themselves.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from opensora.acceleration.torchrun import Torchrun
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.main import told_of

logger = get_logger(__name__)

REPORT = "TORCHELASTIC_ERROR_FILE"  # where torchrun reads what a process that failed has to say
MEETING_PATIENCE = 5.0  # seconds in which the place where processes meet answers
PATIENCE = 5.0  # seconds in which torchrun ends a process once another one has failed

# what torch says when another process has gone; gloo has no exception class of its own
LOST_CONTACT = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


@contextmanager
def reported_once(environment: Mapping[str, str]) -> Iterator[None]:
    """Within it, an error is raised on by the first process that has it; the others end quietly.

    Args:
        environment: where torchrun tells a process about the others, and where to write its error.

    Raises:
        SystemExit: status 2 for a user's mistake that another process reports, 1 for other errors.
    """
    try:
        yield
    except UserError as error:
        if not first_to_say(str(error), environment):
            end_after_the_first(2)
        report(error, environment)
        raise
    except Exception as error:
        if lost_contact(error):
            logger.debug("another process has gone: %s", error)
            end_after_the_first(1)
        if not first_to_say(f"{type(error).__name__}: {error}", environment):
            end_after_the_first(1)
        report(error, environment)
        raise


def report(error: Exception, environment: Mapping[str, str]) -> None:
    """Give torchrun the line of an error for its report, which otherwise says how a traceback could be had."""
    if not (file := environment.get(REPORT)):
        return
    told = {"message": told_of(error), "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")


def end_after_the_first(status: int, patience: float = PATIENCE) -> None:
    """End this process without a word, once the process that has the same to say has ended: torchrun tells it so.

    Args:
        status: of this process if nobody tells it in time, as on another machine.
        patience: in seconds.

    Raises:
        SystemExit: that status.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # with another status it would be in the report
    with suppress(OSError):
        sys.stdout.flush()
    time.sleep(patience)
    raise SystemExit(status)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is not there any more, and not what went wrong there."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONTACT)
    )


def _answers(address: str, port: int) -> bool:
    """Whether the place where processes meet is there; torch, which looks as well, prints pages where it is not."""
    if not address or not port:
        return False
    try:
        socket.create_connection((address, port), MEETING_PATIENCE).close()
    except OSError:
        return False
    return True


def first_to_say(message: str, environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of a run with this message; true where the others cannot be asked."""
    ours = Torchrun.read(environment)
    if ours.world_size == 1 or not _answers(ours.address, ours.port):
        return True
    import torch.distributed as dist

    key = f"opensora/said/{ours.attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(
            ours.address,
            ours.port,
            is_master=False,
            timeout=timedelta(seconds=MEETING_PATIENCE),
            wait_for_workers=False,
        )
        return store.add(key, 1) == 1
    except (RuntimeError, ValueError):
        return True
