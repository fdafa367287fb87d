"""Pictures and clips that clients send: as bytes, as data URLs, and (if the server allows it) as public addresses."""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image

from opensora.serving.request import BadField
from opensora.utils.errors import UserError
from opensora.utils.media.kinds import MAX_PIXELS
from opensora.utils.waiting import within

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
SECONDS = 30.0
CHUNK = 2**16
# Files are told by their first bytes: what else a decoder might take (playlists, say) may name further files.
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
EBML, RIFF = b"\x1aE\xdf\xa3", b"RIFF"
EXPECTED = "expected a PNG, JPEG, WebP, GIF, BMP or TIFF picture, or an MP4, MOV, WebM, MKV or AVI clip"


def is_picture(content: bytes) -> bool:
    """Whether bytes begin as those of a picture do."""
    return content.startswith(PICTURES) or (content.startswith(RIFF) and content[8:12] == b"WEBP")


def is_clip(content: bytes) -> bool:
    """Whether bytes begin as those of a clip do."""
    riff = content.startswith(RIFF) and content[8:12] == b"AVI "
    return riff or content.startswith(EBML) or content[4:8] in (b"ftyp", b"moov", b"mdat", b"wide")


def check_upload(field: str, content: bytes) -> bytes:
    """The bytes of a picture or clip.

    Raises:
        BadField: none, or of nothing that is taken.
    """
    if not content:
        raise BadField(field, f"{field} is empty")
    if not (is_picture(content) or is_clip(content)):
        raise BadField(field, f"{field}: {EXPECTED}")
    check_size(field, content)
    return content


def check_size(field: str, content: bytes) -> None:
    """Refuse a small file that would become an enormous picture, before it is decoded.

    Raises:
        BadField: it would, or its header is damaged.
    """
    if not is_picture(content):
        return  # clips are looked at before they are decoded
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Exception:  # of whatever type: Pillow's readers raise many
        raise BadField(field, f"{field} is damaged: not a readable picture") from None
    if width * height > MAX_PIXELS:
        raise BadField(field, f"{field}: {width} x {height} pixels; at most {MAX_PIXELS:,} are taken")


def read_data_url(field: str, url: str) -> bytes:
    """The bytes of a ``data:`` URL in base64.

    Raises:
        BadField: it is none.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadField(field, f"{field}: expected data:<type>;base64,<bytes>")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise BadField(field, f"{field}: not base64") from None


# ----------------------------------------------------------------------------------------------------------- addresses


def is_public(address: str) -> bool:
    """Whether an IP address is anybody's in the internet: not this machine's, not a private network's, and no other
    spelling of one of those."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96") or found in ipaddress.ip_network("64:ff9b:1::/48"):
            return False  # NAT64, to whatever the network makes of it
    return found.is_global and not found.is_multicast


def resolve(host: str, port: int) -> list[str]:
    """IP addresses of a name."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Fetcher:
    """Fetches from public addresses. A name is resolved once, and the connection goes to what was looked at then, so
    that a name that points elsewhere a moment later gains nothing; redirects are looked at alike.

    Args:
        most: bytes of an answer.
        look_up: of a name's addresses.
        allows: which of them may be connected to.
        ports: by scheme.
    """

    def __init__(
        self,
        most: int,
        look_up: Callable[[str, int], list[str]] = resolve,
        allows: Callable[[str], bool] = is_public,
        ports: dict[str, int] | None = None,
    ) -> None:
        self.most, self.look_up, self.allows, self.ports = most, look_up, allows, ports or PORTS

    def __call__(self, field: str, url: str) -> bytes:
        """What lies at an address.

        Raises:
            BadField: a private or unreachable address, too large or too slow an answer.
        """
        deadline = time.monotonic() + SECONDS
        for _ in range(REDIRECTS + 1):
            try:
                answer = self._get(field, url, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise BadField(field, f"{field}: cannot be fetched ({type(error).__name__})") from None
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise BadField(field, f"{field}: more than {REDIRECTS} redirects")

    def _get(self, field: str, url: str, deadline: float) -> bytes | str:
        """The answer's bytes, or where it sends to."""
        parts = urlsplit(url)
        address = self._address(field, parts)
        connection = _Pinned(parts, address, self.ports[parts.scheme], max(deadline - time.monotonic(), 0.1))
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"User-Agent": "opensora", "Accept-Encoding": "identity"}
            connection.request("GET", target, headers=headers)
            response = within(max(deadline - time.monotonic(), 0.1), connection.getresponse)
            if response.status in (301, 302, 303, 307, 308):
                return response.headers.get("Location") or ""
            if response.status != 200:
                raise BadField(field, f"{field}: the address answers {response.status}")
            return self._read(field, response, deadline)
        finally:
            connection.hang_up()

    def _address(self, field: str, parts: SplitResult) -> str:
        if parts.scheme not in self.ports or not parts.hostname:
            raise BadField(field, f"{field}: expected an http or https address")
        if parts.username or parts.password or parts.port not in (None, self.ports[parts.scheme]):
            raise BadField(field, f"{field}: an address with a password or another port is not fetched")
        found = self.look_up(parts.hostname, self.ports[parts.scheme])
        if not found or not all(self.allows(address) for address in found):
            raise BadField(field, f"{field}: not a public address")
        return found[0]

    def _read(self, field: str, response: http.client.HTTPResponse, deadline: float) -> bytes:
        content = b""
        while chunk := response.read1(CHUNK):
            content += chunk
            if len(content) > self.most:
                raise BadField(field, f"{field}: more than {self.most / 2**20:g} MiB")
            if time.monotonic() > deadline:
                raise BadField(field, f"{field}: the address is too slow")
        return content


class _Pinned(http.client.HTTPConnection):
    """A connection to an IP address in the name of a host."""

    def __init__(self, parts: SplitResult, address: str, port: int, timeout: float) -> None:
        super().__init__(str(parts.hostname), port, timeout=timeout)
        self._address, self._secure = address, parts.scheme == "https"

    def hang_up(self) -> None:
        """Close it, also under the hands of a thread that waits for an answer."""
        with suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def connect(self) -> None:
        """Connect to the address; with https, the certificate must be the host's."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
