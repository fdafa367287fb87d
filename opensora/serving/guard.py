"""Who may ask, from where, and how much at a time: looked at before anything reads a request."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Collection
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora.serving import wire
from opensora.utils.waiting import LEAST_RATE, SLOW_SECONDS

OPEN_PATHS = ("/health",)  # for whoever looks whether the server lives
READING = ("GET", "HEAD", "OPTIONS")
API = "/v1/"
AT_ONCE = 0.01  # seconds: what has come while this process did something else is taken first
TOO_SLOW = "the body of the request comes too slowly"


class Guard:
    """An ASGI application around another.

    Args:
        app: the other.
        key: that clients must send, as ``Authorization: Bearer KEY`` or as the password of a browser; None wants none.
        hosts: names by which browsers may call this machine where there is no key; a page elsewhere whose name points
            here is refused (DNS rebinding).
        most: bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str], most: int) -> None:
        self.app, self.key, self.hosts, self.most = app, key, set(hosts), most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            refusal = self._refusal(scope, Headers(scope=scope))
            if refusal is not None:
                await _answer(send, *refusal)
                return
            receive = self._counted(receive)
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, dict[str, Any], dict[str, str]] | None:
        """Status, body and headers of the answer to a request that is not let in."""
        path, method = scope["path"], scope["method"]
        if self.key is None and not self._is_known(headers.get("host", "")):
            return 403, wire.error("this server does not answer to that name", "wrong_host"), {}
        if self.key is not None and path not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            scheme = 'Bearer realm="opensora"' if path.startswith(API) else 'Basic realm="opensora"'
            body = wire.error("wrong or missing API key", "invalid_api_key", kind="authentication_error")
            return 401, body, {"www-authenticate": scheme}
        origin = headers.get("origin")
        if method not in READING and origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403, wire.error("pages of other sites may not send requests here", "wrong_origin"), {}
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.most:
            return 413, wire.error(self._too_large, "too_large"), {"connection": "close"}
        return None

    @property
    def _too_large(self) -> str:
        return f"a request has at most {self.most / 2**20:g} MiB"

    def _is_known(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname if host else None
        if name is None or name in self.hosts:
            return name is not None
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _has_key(self, given: str) -> bool:
        scheme, _, value = given.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(value.strip().encode(), str(self.key).encode())

    def _counted(self, receive: Receive) -> Receive:
        """Like ``receive``, but for bodies that grow beyond what is taken, or that drip: every `SLOW_SECONDS` must have
        brought their share, whatever came before."""
        seen, pace, is_whole = 0, _Pace(), False

        async def counted() -> Message:
            nonlocal seen, is_whole
            if is_whole:  # what comes now is the end of the connection
                return await receive()
            message = await pace.next(receive)
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self._too_large)
            is_whole = not message.get("more_body", False)
            return message

        return counted


class _Pace:
    """How fast a body comes, looked at again and again."""

    def __init__(self) -> None:
        self._began, self._size = monotonic(), 0

    async def next(self, receive: Receive) -> Message:
        """The next part of a body.

        Raises:
            HTTPException: it comes too slowly.
        """
        while True:
            left = self._began + SLOW_SECONDS - monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, AT_ONCE))
            except TimeoutError:
                self._look()
                continue
            self._size += len(message.get("body", b""))
            if message.get("more_body", False) and monotonic() - self._began > SLOW_SECONDS:
                self._look()
            return message

    def _look(self) -> None:
        if self._size < LEAST_RATE * (monotonic() - self._began):
            raise HTTPException(408, TOO_SLOW)
        self._began, self._size = monotonic(), 0


async def _answer(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    content = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
