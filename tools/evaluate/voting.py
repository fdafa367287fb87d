"""Votes on pairs of videos that a person sees side by side without knowing which is which."""

import csv
import io
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from opensora.datasets.table import read_table
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from tools.evaluate.intervals import WinRate, win_rate

CHOICES = ("left", "right", "tie")
MOST_LETTERS = 40  # of the name of a person


@dataclass(frozen=True)
class Vote:
    """One click.

    Attributes:
        rater: who clicked, as they call themselves.
        pair: name of the pair in pairs.csv.
        left: which setting was on the left, ``a`` or ``b``.
        choice: ``left``, ``right`` or ``tie``.
        seconds: how long they looked.
        time: when, in seconds of the system's clock.
    """

    rater: str
    pair: str
    left: str
    choice: str
    seconds: float
    time: float

    @property
    def outcome(self) -> float:
        """1 where the second setting was preferred, 0 where the first was, 0.5 for neither."""
        if self.choice == "tie":
            return 0.5
        return float((self.choice == "left") == (self.left == "b"))


class Ballot:
    """The pairs of a comparison and the votes on them, which are kept as they come.

    Args:
        folder: of ``pairs.csv``; votes are appended to ``votes.csv`` beside it.

    Raises:
        UserError: no comparison there, or videos of it are gone.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "votes.csv"
        if not (folder / "pairs.csv").is_file():
            raise UserError(f"{folder}: no pairs.csv; compare.py A B --out {folder} makes it")
        rows = read_table(folder / "pairs.csv", as_text=True)
        self.prompts = dict(zip(rows["pair"], rows["prompt"]))
        self.files = {pair: {"a": Path(a), "b": Path(b)} for pair, a, b in zip(rows["pair"], rows["a"], rows["b"])}
        for sides in self.files.values():
            if gone := [path for path in sides.values() if not path.is_file()]:
                raise UserError(f"{gone[0]}, of the comparison in {folder}, is not there any more")
        self.votes = read_votes(self.path)
        self.lock = threading.Lock()

    def order(self, rater: str) -> list[tuple[str, str]]:
        """All pairs with the setting on the left (``a`` or ``b``), in an order that is a person's own."""
        chance = random.Random(f"order of {rater}")
        pairs = [(pair, chance.choice("ab")) for pair in self.files]
        chance.shuffle(pairs)
        return pairs

    def next(self, rater: str) -> tuple[str, str] | None:
        """What a person has not voted on yet, None at the end."""
        done = {vote.pair for vote in self.votes if vote.rater == rater}
        return next((found for found in self.order(rater) if found[0] not in done), None)

    def file(self, rater: str, pair: str, side: str) -> Path | None:
        """The video that a person sees on a side, None for what is not."""
        left = dict(self.order(rater)).get(pair)
        if left is None or side not in ("left", "right"):
            return None
        return self.files[pair]["ab"[("ab".index(left) + (side == "right")) % 2]]

    def vote(self, rater: str, pair: str, choice: str, seconds: float) -> bool:
        """Keep a vote; False for one that cannot be, or that is there already."""
        left = dict(self.order(rater)).get(pair)
        with self.lock:
            known = any(vote.rater == rater and vote.pair == pair for vote in self.votes)
            if left is None or choice not in CHOICES or not 0 < len(rater) <= MOST_LETTERS or known:
                return False
            found = Vote(rater, pair, left, choice, round(seconds, 1), round(time.time(), 1))
            append_vote(self.path, found)
            self.votes.append(found)
        return True

    def result(self) -> WinRate:
        """How often the second setting was preferred.

        Raises:
            UserError: nobody has voted.
        """
        if not self.votes:
            raise UserError(f"{self.path}: no votes yet")
        return win_rate([(vote.pair, vote.outcome) for vote in self.votes])

    def people(self) -> Mapping[str, int]:
        """Votes of each person."""
        return Counter(vote.rater for vote in self.votes)


def append_vote(path: Path, vote: Vote) -> None:
    """Add a vote to a table, which begins with the names of the columns, or leave the table as it is."""
    row = io.StringIO(newline="")
    writer = csv.DictWriter(row, [field.name for field in fields(Vote)])
    before = path.read_bytes() if path.is_file() else b""
    if not before:
        writer.writeheader()
    writer.writerow(asdict(vote))
    write_beside(path, lambda temporary: temporary.write_bytes(before + row.getvalue().encode()))


def read_votes(path: Path) -> list[Vote]:
    """Votes of a table, none where there is none.

    Raises:
        UserError: names the row that is damaged.
    """
    if not path.is_file():
        return []
    votes: list[Vote] = []
    for index, row in enumerate(read_table(path, as_text=True).to_dict("records")):
        try:
            texts = {name: row[name] for name in ("rater", "pair", "left", "choice")}
            vote = Vote(**texts, seconds=float(row["seconds"]), time=float(row["time"]))
        except (KeyError, ValueError):
            vote = None
        if vote is None or vote.choice not in CHOICES or vote.left not in ("a", "b"):
            raise UserError(f"{path}, row {index + 2}: no vote (rater, pair, left a or b, choice left, right or tie)")
        votes.append(vote)
    return votes
