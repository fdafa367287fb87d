"""Fetching a file from the web with limits on size and time."""

import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from opensora.utils.waiting import within

MAX_BYTES = 256 * 2**20
MAX_SECONDS = 60.0
CHUNK = 2**16
NOTE = ".address"  # of a file beside a download: where it comes from


def is_url(text: str) -> bool:
    """Whether a reference is to be fetched from the web."""
    return text.startswith(("http://", "https://"))


def fetch(
    url: str, folder: str | Path, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS, name: str = "file"
) -> Path:
    """Download ``url`` into ``folder``.

    Args:
        url: http or https address.
        folder: where the file goes; made if it is missing.
        max_bytes: largest file accepted.
        max_seconds: longest time for the whole transfer.
        name: file name without ending; the ending comes from the address or from what the server says.

    Returns:
        The file.

    Raises:
        UserError: unreachable, refused, too large or too slow.
    """
    start = time.monotonic()
    request = urllib.request.Request(url, headers={"User-Agent": "opensora"})
    idle = max_seconds / 4  # of a server that sends nothing; one that sends a byte now and then has the rest
    try:
        with within(max_seconds - idle, lambda: urllib.request.urlopen(request, timeout=idle)) as response:
            suffix = Path(urlsplit(url).path).suffix or mimetypes.guess_extension(response.headers.get_content_type())
            length = int(response.headers.get("Content-Length") or 0)
            if length > max_bytes:
                raise UserError(f"{url}: larger than {max_bytes / 2**20:.0f} MiB")

            def write(path: Path) -> None:
                size = _copy(response, path, url, max_bytes, start + max_seconds - idle)
                if size < length:
                    raise UserError(f"{url}: the download ended after {size} of {length} bytes")

            found = write_beside(Path(folder) / f"{name}{suffix or ''}", write)
            found.with_name(f"{name}{NOTE}").write_text(url, encoding="utf-8")
            return found
    except (OSError, urllib.error.URLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url}: {reason}") from error


def _copy(response, path: Path, url: str, max_bytes: int, deadline: float) -> int:
    size = 0
    with path.open("wb") as file:
        while chunk := response.read1(CHUNK):  # what is there, without waiting for all of it
            size += len(chunk)
            if size > max_bytes:
                raise UserError(f"{url}: larger than {max_bytes / 2**20:.0f} MiB")
            if time.monotonic() > deadline:
                raise UserError(f"{url}: the download took too long")
            file.write(chunk)
    return size


@contextmanager
def naming_addresses(folder: Path) -> Iterator[None]:
    """Within it, messages name files that were fetched into ``folder`` by their addresses."""
    try:
        yield
    except UserError as error:
        said = str(error)
        for note in folder.glob(f"*{NOTE}"):
            for path in folder.glob(f"{note.stem}.*"):
                said = said.replace(str(path), note.read_text(encoding="utf-8"))
        if said == str(error):
            raise
        raise type(error)(said) from error
