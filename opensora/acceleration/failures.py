"""Errors of runs with several processes: said once, and the end of one is the end of all.

torchrun ends all processes when one fails. What is left to do is that they do not all print the same: a mistake in a
config is found by every process, and a process that dies makes the others fail in whatever exchange they wait in.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from opensora.acceleration.torchrun import Torchrun
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

# what torch says when another process has gone; gloo has no exception class of its own
LOST_CONTACT = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


@contextmanager
def reported_once(environment: Mapping[str, str]) -> Iterator[None]:
    """Within it, an error is raised on by the first process that has it; the others end quietly.

    Args:
        environment: where torchrun tells a process about the others.

    Raises:
        SystemExit: status 2 for a user's mistake that another process reports, 1 for other errors.
    """
    try:
        yield
    except UserError as error:
        if not first_to_say(str(error), environment):
            raise SystemExit(2) from None
        raise
    except Exception as error:
        if lost_contact(error):
            logger.debug("another process has gone: %s", error)
            raise SystemExit(1) from None
        if not first_to_say(f"{type(error).__name__}: {error}", environment):
            raise SystemExit(1) from None
        raise


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is not there any more, and not what went wrong there."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONTACT)
    )


def first_to_say(message: str, environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of a run with this message; true where the others cannot be asked."""
    ours = Torchrun.read(environment)
    if ours.world_size == 1:
        return True
    import torch.distributed as dist

    key = f"opensora/said/{ours.attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(
            ours.address, ours.port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        return store.add(key, 1) == 1
    except (RuntimeError, ValueError):
        return True
