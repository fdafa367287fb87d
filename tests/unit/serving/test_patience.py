"""Clients that drip the head of a request, or what nobody reads any more, are hung up on; others are not."""

import asyncio
import time

import pytest

pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
import uvicorn
from uvicorn.server import ServerState

from opensora.serving.patience import PatientFor

LIMIT, PAUSE = 0.3, 0.01
LONG = 5.0  # which a test waits at most, and what drips takes longer than
GET, HALF = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/1.1\r\nx: "
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9999\r\n\r\n"


class Hasty(PatientFor):
    seconds = LIMIT


async def application(scope, receive, send):
    """Answers a GET at once, a PUT when its body is there, and refuses the body of a POST."""
    while scope["method"] == "PUT" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def hung_up(talk):
    """Whether the server closes the connection of a client while it talks."""

    async def run():
        config = uvicorn.Config(application, lifespan="off", log_level="warning")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        async with await loop.create_server(lambda: Hasty(config, state, {}), "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            talking = asyncio.create_task(talk(writer))
            began = time.monotonic()
            while not talking.done() and not reader.at_eof() and time.monotonic() - began < LONG:
                try:
                    await asyncio.wait_for(reader.read(1000), PAUSE)
                except TimeoutError:
                    continue
                except OSError:
                    break
            found = not talking.done()
            talking.cancel()
            writer.transport.abort()
            assert time.monotonic() - began < LONG
            return found

    return asyncio.run(run())


async def drip(writer, parts):
    for part in parts:
        writer.write(part)
        await asyncio.sleep(PAUSE)


@pytest.mark.parametrize("first", [b"", HALF, GET + HALF, POST], ids=["nothing", "half", "second", "refused"])
def test_what_drips(first):
    assert hung_up(lambda writer: drip(writer, [first, *[b"x"] * 1000]))


def test_silence():
    assert hung_up(lambda writer: asyncio.sleep(60))


def test_requests_and_a_body_that_take_longer_than_a_head_may():
    body = [b"PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 30\r\n\r\n", *[b"x"] * 30]
    assert not hung_up(lambda writer: drip(writer, [*[GET] * 20, *body, GET]))
