"""Ask people which of two videos is better, without telling them which setting made which.

    python tools/evaluate/vote.py runs/steps            then open http://127.0.0.1:8000 in a browser
    python tools/evaluate/vote.py runs/steps --result   the win rate so far

Works on a folder of compare.py. Sides and order are drawn anew for each person; votes are kept in votes.csv as they
come, so that one can stop and go on. The server answers this machine only (over ssh: ssh -L 8000:127.0.0.1:8000 HOST).
"""

import argparse
import json
import secrets
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.main import told_of
from tools.arguments import Bounded, user_path
from tools.evaluate.voting import Ballot

PAGE = Path(__file__).with_name("vote.html")
MOST_BYTES = 10_000  # of a vote
TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg"}


class VoteServer(ThreadingHTTPServer):
    """Serves one ballot on the loopback interface.

    Args:
        ballot: the pairs and votes.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, ballot: Ballot, port: int) -> None:
        super().__init__(("127.0.0.1", port), VoteHandler)
        self.ballot = ballot
        self.token = secrets.token_urlsafe(16)  # known to the page alone: other sites cannot send votes

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://127.0.0.1:{self.server_port}"


class VoteHandler(BaseHTTPRequestHandler):
    """``/`` the page, ``/next`` a pair, ``/video`` one side of it, ``/vote`` takes a click."""

    server: VoteServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer the page and its requests."""
        if not self._is_local():
            return
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path == "/":
            page = PAGE.read_text("utf-8").replace("TOKEN", self.server.token)
            self._answer(page.encode(), "text/html; charset=utf-8")
        elif address.path == "/next":
            self._answer(json.dumps(self._next(query.get("rater", ""))).encode(), "application/json")
        elif address.path == "/video":
            self._send_video(query)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Take a vote."""
        length = int(self.headers.get("Content-Length") or 0)
        if not self._is_local() or not 0 < length <= MOST_BYTES:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        try:
            vote = json.loads(self.rfile.read(length))
            given = (str(vote["rater"]), str(vote["pair"]), str(vote["choice"]), float(vote["seconds"]))
            is_ours = secrets.compare_digest(str(vote["token"]), self.server.token)
        except (ValueError, KeyError, TypeError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        if self.path != "/vote" or not is_ours:
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        try:
            kept = self.server.ballot.vote(*given)
        except OSError as error:
            print(f"warning: a vote cannot be kept: {told_of(error)}", file=sys.stderr, flush=True)
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE)
            return
        self._answer(json.dumps({"kept": kept}).encode(), "application/json")

    def _is_local(self) -> bool:
        """Whether the browser means this server: a name of another site that leads here is refused."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host in ("127.0.0.1", "localhost"):
            return True
        self._refuse(HTTPStatus.FORBIDDEN)
        return False

    def _next(self, rater: str) -> Mapping[str, object]:
        ballot = self.server.ballot
        done = sum(vote.rater == rater for vote in ballot.votes)
        found = ballot.next(rater)
        state = {"done": done, "all": len(ballot.files)}
        if found is None:
            return state
        pair = found[0]
        return {**state, "pair": pair, "prompt": ballot.prompts[pair], "suffix": ballot.files[pair]["a"].suffix}

    def _send_video(self, query: Mapping[str, str]) -> None:
        path = self.server.ballot.file(*(query.get(name, "") for name in ("rater", "pair", "side")))
        if path is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self._answer(path.read_bytes(), TYPES.get(path.suffix.lower(), "application/octet-stream"))

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # what was sent is not read any further
        self.send_error(status)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing of single requests."""


def show_result(ballot: Ballot) -> None:
    """Print the win rate of the second setting."""
    found = ballot.result()
    people = ", ".join(f"{name} {count}" for name, count in ballot.people().items())
    rate, low, high = (f"{100 * value:.1f} %" for value in (found.rate.mean, found.rate.low, found.rate.high))
    print(f"votes:    {found.wins} for B, {found.losses} for A, {found.ties} for neither ({people})")
    print(f"win rate: {rate} of pairs go to B, 95 % interval {low} to {high}; sign test p = {found.p:.3g}")


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C, or print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, help="results of compare.py")
    parser.add_argument(
        "--port", type=int, action=Bounded, least=0, most=65535, default=8000, help="0 takes a free one"
    )
    parser.add_argument("--result", action="store_true", help="print the win rate instead")
    args = parser.parse_args(argv)
    if args.result:
        show_result(Ballot(args.folder))
        return
    votes = Ballot(args.folder).path  # mistakes come before a lock
    with claimed(votes, is_folder=False, advice="one server takes the votes of all"):
        serve(Ballot(args.folder), args.port)


def serve(ballot: Ballot, port: int) -> None:
    """Serve a ballot until Ctrl-C.

    Raises:
        UserError: the port is taken.
    """
    try:
        server = VoteServer(ballot, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; give another, or 0 for a free one") from error
    print(f"{server.address} (Ctrl-C ends; votes go to {ballot.path})", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run_main(main)
