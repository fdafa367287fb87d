"""A server that makes one video for a client, and then ends: ``served.py CONFIG [--key value ...]``.

It takes a free port, and its status tells whether the client has got its video.
"""

import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from opensora.serving.command import main as serve
from opensora.utils.errors import Terminated, UserError
from opensora.utils.main import run_main

PAUSE, MOMENT = 0.1, 3.0  # seconds
BODY = {"prompt": "a", "num_frames": 5, "num_inference_steps": 1}
MADE, FAILED = 0, 1


def main(argv: list[str] | None = None) -> None:
    """Serve until the client has been served."""
    words = sys.argv[1:] if argv is None else argv
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    client = os.fork()
    if client == 0:
        os._exit(_client(f"http://127.0.0.1:{port}", os.getppid()))
    try:
        serve([*words, "--port", str(port), "--page", "False"])
    except Terminated:  # it was told to end
        pass
    finally:
        status = _status_of(client)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise SystemExit(128 + signal.SIGTERM)  # somebody else ended the server
    if code != MADE:
        raise UserError("the server did not make the video")


def _status_of(client: int) -> int:
    """How the client has ended, or does now, since it ends the server first; else it is killed."""
    patience = time.monotonic() + MOMENT
    while time.monotonic() < patience:
        ended, status = os.waitpid(client, os.WNOHANG)
        if ended:
            return status
        time.sleep(PAUSE)
    os.kill(client, signal.SIGKILL)
    return os.waitpid(client, 0)[1]


def _client(address: str, server: int) -> int:
    """Have a video made, then end the server; whether it was made."""
    try:
        id = _when_there(f"{address}/v1/videos", json.dumps(BODY).encode())["id"]
        while (status := _when_there(f"{address}/v1/videos/{id}")["status"]) not in ("completed", "failed"):
            time.sleep(PAUSE)
        made = status == "completed"
    except OSError as error:
        print(f"client: {error}", file=sys.stderr)
        made = False
    os.kill(server, signal.SIGTERM)
    return MADE if made else FAILED


def _when_there(address: str, body: bytes | None = None) -> Any:
    """What the server answers, once it listens."""
    while True:
        try:
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise OSError(error.read().decode(errors="replace")) from error
        except OSError:
            time.sleep(PAUSE)


if __name__ == "__main__":
    run_main(main)
