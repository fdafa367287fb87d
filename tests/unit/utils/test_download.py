"""Files from the web, with limits."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from opensora.utils.download import fetch, is_url, naming_addresses
from opensora.utils.errors import UserError
from opensora.utils.video import read_image


@pytest.fixture
def address():
    """A server: ``/a.png`` and ``/picture`` are a picture, ``/endless`` and ``/slow`` never end."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(buffer, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/gone":
                self.send_error(404)
                return
            if self.path == "/dripping%20head":
                with contextlib.suppress(OSError):
                    for _ in range(200):
                        self.wfile.write(b"H")
                        time.sleep(0.02)
                return
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            if self.path == "/cut.png":
                self.send_header("Content-Length", "99")
            self.end_headers()
            try:
                if self.path == "/cut.png":
                    pass
                elif self.path == "/endless":
                    for _ in range(100):
                        self.wfile.write(bytes(2**16))
                elif self.path == "/dripping":
                    for _ in range(200):
                        self.wfile.write(b"x")
                        time.sleep(0.02)
                elif self.path == "/slow":
                    for _ in range(20):
                        self.wfile.write(bytes(2**16))
                        time.sleep(0.05)
                else:
                    self.wfile.write(buffer.getvalue())
            except OSError:
                pass  # the client hung up

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["a.png", "picture", "a.png?size=2"])
def test_picture(address, tmp_path, name):
    path = fetch(f"{address}/{name}", tmp_path)
    assert path.suffix == ".png", "from the address, else from what the server says"
    np.testing.assert_array_equal(read_image(path)[0, 0], [9, 8, 7])


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("endless", {"max_bytes": 2**18}, "larger than 0 MiB"),
        ("slow", {"max_seconds": 0.1}, "took too long|timed out"),
        ("dripping", {"max_seconds": 0.4}, "took too long|timed out"),
        ("dripping%20head", {"max_seconds": 0.4}, "no answer within|timed out"),
        ("cut.png", {}, "cut.png: the download ended after 0 of 99 bytes"),
        ("gone", {}, "cannot download .*Not Found"),
    ],
)
def test_limits(address, tmp_path, name, limits, message):
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        fetch(f"{address}/{name}", tmp_path, **limits)
    assert time.monotonic() - began < 3, "a dripping server takes 4 s"
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_named_by_its_address(address, tmp_path):
    path = fetch(f"{address}/a.png", tmp_path, name="1f")
    with pytest.raises(UserError, match=f"^{address}/a.png: too small$"), naming_addresses(tmp_path):
        raise UserError(f"{path}: too small")


def test_nobody_there(tmp_path):
    with pytest.raises(UserError, match="cannot download"):
        fetch("http://127.0.0.1:9/a.png", tmp_path, max_seconds=0.5)


def test_what_is_an_address():
    assert is_url("https://example.org/a.png")
    assert not is_url("pictures/http.png")
