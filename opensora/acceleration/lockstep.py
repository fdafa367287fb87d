"""Several calls of one model side by side, block by block: all go through one block before any goes through the next.

Weights that come to the device a block at a time then come once for all calls. Each call computes what it would
compute alone, in a thread of its own; only one of them runs at any moment, and they take turns in a fixed order, so
that results (and what several ranks exchange) do not depend on chance.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a call whose fellow has failed."""


class _Call(Generic[T]):
    """A call in a thread, which runs from one turn to the next when it is resumed.

    Args:
        function: the call.
        resumed: run in the thread whenever the call goes on.
    """

    def __init__(self, function: Callable[[], T], resumed: Callable[[], None]) -> None:
        self.function, self.resumed = function, resumed
        self.result: T | None = None
        self.error: BaseException | None = None
        self.done = self.stopped = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(_settings(),), daemon=True)
        self._thread.start()

    def _run(self, settings: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self.stopped:
                with settings():
                    self.resumed()
                    self.result = self.function()
        except BaseException as error:  # whatever it is, the thread that waits gets it
            self.error = error
        self.done = True
        self._paused.release()

    def resume(self) -> None:
        """Let the call run to its next turn, or to its end."""
        self._go.release()
        self._paused.acquire()

    def pause(self) -> None:
        """In the call's thread: let the others run."""
        self._paused.release()
        self._go.acquire()
        if self.stopped:
            raise _Stopped
        self.resumed()

    def stop(self) -> None:
        """End the call."""
        self.stopped = True
        while not self.done:
            self.resume()

    def runs_here(self) -> bool:
        """Whether this is the call's thread."""
        return threading.current_thread() is self._thread


def _settings() -> Callable[[], Any]:
    """What torch keeps by thread, as it is in this one, to be entered in another."""
    grad = torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    class Settings:
        def __enter__(self) -> None:
            torch.set_grad_enabled(grad)
            self.on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
            if stream is not None:
                torch.cuda.set_device(stream.device)
            self.on_stream.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.on_stream.__exit__(*error)

    return Settings


class Lockstep:
    """Takes calls through a model together, see the module."""

    def __init__(self) -> None:
        self._calls: list[_Call[Any]] = []

    def turn(self) -> None:
        """Called before each block: lets the other calls get there first. Nothing happens outside of :meth:`run`."""
        for call in self._calls:
            if call.runs_here():
                call.pause()

    def run(self, functions: Sequence[Callable[[], T]], resumed: Sequence[Callable[[], None]]) -> list[T]:
        """Results of calls.

        Args:
            functions: each calls the model.
            resumed: for each, what is to be done whenever it goes on after another one ran.
        """
        if len(functions) == 1:
            resumed[0]()
            return [functions[0]()]
        self._calls = [_Call(*pair) for pair in zip(functions, resumed, strict=True)]
        try:
            while any(not call.done for call in self._calls):
                for call in self._calls:
                    if not call.done:
                        call.resume()
                    if call.error is not None:
                        raise call.error
            return [call.result for call in self._calls]  # type: ignore[misc]
        finally:
            for call in self._calls:
                call.stop()
            self._calls = []
