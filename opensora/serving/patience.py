"""Connections whose clients send the head of a request a byte now and then, or none at all, are closed: the limits of
uvicorn are for clients that are silent between two requests."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from opensora.utils.waiting import HEAD_SECONDS


class PatientFor(H11Protocol):
    """A connection that is closed unless the whole head of a request has come so many seconds after the connection was
    made, or after the first byte since the last answer. What comes of a body that was answered early counts as that
    too: nothing reads it any more. Bodies that are read are the guard's, see :mod:`opensora.serving.guard`.

    Attributes:
        seconds: for a head.
    """

    seconds = HEAD_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.seconds, self._hang_up)

    def data_received(self, data: bytes) -> None:
        """A head is due if no request is being answered."""
        super().data_received(data)
        if not self._is_idle:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._forget()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        self._deadline = None
        if self._is_idle and self.transport.get_protocol() is self:  # else it has become another kind of connection
            self.transport.close()
