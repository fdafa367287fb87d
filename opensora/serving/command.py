"""``serve CONFIG [--key value ...]``: the web page and the server, until it is stopped."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from opensora.acceleration.torchrun import Torchrun
from opensora.config import parse_config
from opensora.config.commands import ServeOptions
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.paths import in_checkout

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client",
          "python_multipart": "python-multipart"}  # fmt: skip
LEAST_KEY = 8  # letters


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is stopped.

    Raises:
        UserError: anything wrong with config, weights, key or place; found before the server listens.
    """
    cfg = with_key(parse_config(argv, ServeOptions))
    if Torchrun.read(os.environ).world_size > 1:
        raise UserError("start one server, without torchrun: --worker-processes N starts its ranks")
    check_address(cfg)
    check_installed(cfg)
    from opensora.serving.run import serve  # after parsing: --help and typos answer at once
    from opensora.utils.logging import setup_logging

    setup_logging()
    with ExitStack() as held:
        held.enter_context(claimed(Path(cfg.data_dir).expanduser(), advice="give this server another --data-dir"))
        listening = held.enter_context(listen(cfg.host, cfg.port))
        serve(cfg, listening, os.environ)


def with_key(cfg: ServeOptions) -> ServeOptions:
    """The config with its key read from the file that holds it.

    Raises:
        UserError: no such file, no key in it, or one that is too short.
    """
    key = cfg.api_key
    if cfg.api_key_file is not None:
        if key is not None:
            raise UserError("give --api-key or --api-key-file")
        try:
            key = Path(cfg.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {cfg.api_key_file}: cannot be read ({error})") from None
    if key is not None and (len(key) < LEAST_KEY or not key.isprintable() or not key.isascii()):
        raise UserError(f"--api-key: at least {LEAST_KEY} letters or digits, without line breaks")
    return replace(cfg, api_key=key, api_key_file=None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(cfg: ServeOptions) -> None:
    """Refuse to listen to others without a key."""
    if not is_loopback(cfg.host) and cfg.api_key is None:
        raise UserError(
            f"--host {cfg.host}: others reach it, so give --api-key KEY (or --api-key-file FILE) that they must send; "
            "127.0.0.1, the default, is this machine's own"
        )


def check_installed(cfg: ServeOptions) -> None:
    """See that the packages of the extra ``serve`` are there."""
    needed = {**NEEDED, **({"gradio": "gradio"} if cfg.page else {})}
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        wanted = "-r requirements-serve.txt" if in_checkout() else '"opensora[serve]"'
        raise UserError(f"the server needs {', '.join(missing)}: pip install {wanted}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: no such address, or the port is taken.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another --port") from None
