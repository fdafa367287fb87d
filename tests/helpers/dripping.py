"""A server that sends a byte now and then."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def dripping(pause: float = 0.02, size: int = 200, times: list[float] | None = None) -> Iterator[str]:
    """Address of a server that drips whatever it sends: the head of ``/head...``, the body of all else.

    Args:
        pause: seconds between two bytes.
        size: bytes of a body; then it ends, too early.
        times: gets the time of every byte, by ``time.monotonic()``.
    """

    sent = [] if times is None else times

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\nETag: abc\r\nX-Repo-Commit: abc\r\n\r\n"
            try:
                if self.command == "HEAD" or "head" not in self.path:
                    self.wfile.write(whole)
                    whole = b"" if self.command == "HEAD" else b" " * size
                for byte in whole:
                    self.wfile.write(bytes([byte]))
                    sent.append(time.monotonic())
                    time.sleep(pause)
            except OSError:
                pass  # the client hung up

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
