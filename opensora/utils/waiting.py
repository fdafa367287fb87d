"""Waiting for servers, which may be slow, silent, or send a byte now and then: never longer than is said."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from opensora.utils.errors import UserError

T = TypeVar("T")
HEAD_SECONDS = 20.0  # for the head of an answer, its redirections included
SLOW_SECONDS = 20.0  # of a body, after which one that has come too slowly is given up
LEAST_RATE = 1000.0  # bytes per second


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call gives, which may take so many seconds.

    It runs in a thread, which goes on to wait, and holds nothing up, after a call that takes longer.

    Raises:
        TimeoutError: it takes longer.
    """
    found: list[tuple[T | None, BaseException | None]] = []

    context = contextvars.copy_context()

    def run() -> None:
        try:
            found.append((context.run(call), None))
        except BaseException as error:  # for the thread that waits
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    result, error = found[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def in_time(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of a body.

    Raises:
        UserError: they come too slowly.
    """
    began, size = time.monotonic(), 0
    for chunk in chunks:
        size += len(chunk)
        seconds = time.monotonic() - began
        if seconds > SLOW_SECONDS:
            if size < LEAST_RATE * seconds:
                raise UserError(f"the server sends too slowly: {size} bytes in {seconds:.0f} s")
            began, size = time.monotonic(), 0
        yield chunk


@contextmanager
def no_slow_hub(is_asked: bool = True) -> Iterator[None]:
    """Within it, libraries that ask the Hugging Face hub give up a server that drips: no head of an answer in time, or
    less than `LEAST_RATE`. Their own limits are for single reads of a socket, to which every byte gives new time. They
    ask for many files, and again; a server that was given up once is not asked any more.

    Args:
        is_asked: False where they are told to take local files only: then there is nothing to do.
    """
    from huggingface_hub import get_session

    client: Any = get_session() if is_asked else None
    if not hasattr(client, "build_request"):  # before 1.0 it has a client of another library
        yield
        return
    plain, before = client.send, vars(client).get("send")
    given_up: dict[str, UserError] = {}

    def send(request: Any, *, stream: bool = False, **options: Any) -> Any:
        host = str(request.url.host)
        if host in given_up:
            raise given_up[host]
        try:
            answer = within(HEAD_SECONDS, lambda: plain(request, stream=True, **options))
        except TimeoutError as error:
            given_up[host] = UserError(f"{host}: {error}")
            raise given_up[host] from None
        answer.stream = _watched(answer.stream, partial(given_up.__setitem__, host))
        if not stream:
            answer.read()
        return answer

    client.send = send
    try:
        yield
    finally:
        del client.send
        if before is not None:
            client.send = before


def _watched(stream: Any, give_up: Callable[[UserError], None]) -> Any:
    """A stream of a library's own kind that gives up, and tells so."""

    class Watched(type(stream)):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from in_time(iter(stream))
            except UserError as error:
                give_up(error)
                raise

        def close(self) -> None:
            stream.close()

    return Watched()
