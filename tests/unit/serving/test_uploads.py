"""Uploads by their first bytes, and addresses that may be fetched."""

import io
import socket
import struct
import threading
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from opensora.serving import uploads
from opensora.serving.request import BadField
from opensora.serving.uploads import Fetcher, check_upload, is_public, read_data_url

PRIVATE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1%eth0",
    "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2001:db8::1", "2001:0:0:0:0:0:80ff:fffe",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_in_all_spellings(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path.startswith("/drip"):
            with suppress(OSError):
                for byte in (b"" if "head" in self.path else b"HTTP/1.0 200 OK\r\n\r\n", *[b"H"] * 100):
                    self.wfile.write(byte)
                    time.sleep(0.02)
            return
        content = b"x" * 3000 if self.path == "/large" else f"{self.headers['Host']} {self.path}".encode()
        self.send_response(404 if self.path == "/gone" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def fetcher(port, looked_up=None, **names):
    """One that takes this machine for the internet, but for the names that are private."""

    def look_up(host, _):
        if looked_up is not None:
            looked_up.append(host)
        return [names.get(host, "127.0.0.1")]

    return Fetcher(2000, look_up, lambda address: address == "127.0.0.1", {"http": port, "https": port})


def test_the_connection_goes_to_the_address_that_was_looked_at(port):
    looked_up = []
    assert fetcher(port, looked_up)("ref", "http://a.example/b?c=d") == f"a.example:{port} /b?c=d".encode()
    assert looked_up == ["a.example"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/to/http://private.example/", "not a public address"),
        ("/to/http://10.0.0.1/", "not a public address"),
        ("/to/file:///etc/passwd", "expected an http"),
        ("/to//to//to//to//to/x", "redirects"),
        ("/large", "more than"),
        ("/gone", "answers 404"),
    ],
)
def test_answers_that_are_refused(port, path, message):
    own = {"private.example": "10.0.0.1", "10.0.0.1": "10.0.0.1"}
    with pytest.raises(BadField, match=message):
        fetcher(port, **own)("ref", f"http://a.example{path}")


@pytest.mark.parametrize("path", ["/drip", "/drip-head"])
def test_an_answer_that_drips(port, path, monkeypatch):
    monkeypatch.setattr(uploads, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(BadField, match="too slow|cannot be fetched"):
        fetcher(port)("ref", f"http://a.example{path}")
    assert time.monotonic() - began < 1.5, "all of it takes 2 seconds"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/", "http://0/",
        "http://user:pass@example.com/", "http://example.com:22/", "ftp://example.com/", "gopher://x", "http://", "http:///x",
        "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest", "http://[bad/", "http://a.example:99999/",
    ],
)  # fmt: skip
def test_addresses_that_are_never_asked(url, monkeypatch):
    def connects(*args, **kwargs):
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", connects)
    with pytest.raises(BadField):
        Fetcher(1000)("ref", url)


def png(width, height):
    """A small file of an enormous picture."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"", b"text", b"#EXTM3U\nhttp://x", b"ffconcat version 1.0\n", b"%PDF", b"<svg/>"])
def test_bytes_of_nothing_that_is_taken(content):
    with pytest.raises(BadField, match=r"empty|expected a PNG"):
        check_upload("input_reference", content)


def test_enormous_and_damaged_pictures_are_not_decoded():
    with pytest.raises(BadField, match="60000 x 60000|damaged"):
        check_upload("input_reference", png(60000, 60000))
    with pytest.raises(BadField, match="9000 x 9000"):
        check_upload("input_reference", png(9000, 9000))
    with pytest.raises(BadField, match="damaged"):
        check_upload("input_reference", b"\x89PNG\r\n\x1a\n" + b"?" * 30)


def test_a_picture_is_taken_also_as_a_data_url():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    assert check_upload("input_reference", buffer.getvalue()) == buffer.getvalue()
    assert read_data_url("ref", "data:image/png;base64,AAEC") == b"\0\1\2"
    for url in ("data:,x", "data:image/png;base64,***", "data:image/png;base64"):
        with pytest.raises(BadField):
            read_data_url("ref", url)
