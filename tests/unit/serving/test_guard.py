"""Bodies that drip, or never come, hold no request up."""

import asyncio
import itertools

import pytest

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
from starlette.exceptions import HTTPException

from opensora.serving import guard
from opensora.serving.guard import Guard


def body(receive):
    """What an application reads of a request behind a guard."""

    async def application(scope, receive, send):
        while (message := await receive()).get("more_body"):
            assert message["type"] == "http.request"
        await receive()  # until the client goes

    scope = {"type": "http", "path": "/", "method": "POST", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(Guard(application, None, (), 10**9)(scope, receive, None))


def test_a_body_that_drips(monkeypatch):
    now = itertools.count(step=15.0)
    monkeypatch.setattr(guard, "monotonic", lambda: next(now))

    async def drip():
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(HTTPException, match="too slowly") as raised:
        body(drip)
    assert raised.value.status_code == 408


def test_a_body_that_drips_after_much_has_come(monkeypatch):
    monkeypatch.setattr(guard, "SLOW_SECONDS", 0.05)
    parts = iter([bytes(10**6)])

    async def drip():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": next(parts, b"x"), "more_body": True}

    with pytest.raises(HTTPException, match="too slowly"):
        body(drip)


def test_what_came_while_the_server_did_something_else_counts(monkeypatch):
    now, parts = itertools.count(step=21.0), iter([True] * 5 + [False])
    monkeypatch.setattr(guard, "monotonic", lambda: next(now))

    async def steady():
        return {"type": "http.request", "body": bytes(100_000), "more_body": next(parts, False)}

    body(steady)


def test_a_body_that_never_comes(monkeypatch):
    monkeypatch.setattr(guard, "SLOW_SECONDS", 0.01)
    with pytest.raises(HTTPException, match="too slowly"):
        body(lambda: asyncio.sleep(60))


def test_a_large_body_takes_its_time_and_a_client_may_stay(monkeypatch):
    monkeypatch.setattr(guard, "SLOW_SECONDS", 0.05)
    parts = iter([True] * 3 + [False])

    async def steady():
        more = next(parts, None)
        if more is None:
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": bytes(10_000), "more_body": more}

    body(steady)
