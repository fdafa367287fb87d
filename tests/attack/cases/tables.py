"""Every table that a command reads, with everything that people get wrong in tables."""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.attack.cases import commands
from tests.attack.cases.commands import Command
from tests.attack.runner import Case

Rows = list[list[str]]


def _text(rows: Rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _without(rows: Rows, column: str) -> Rows:
    at = rows[0].index(column)
    return [row[:at] + row[at + 1 :] for row in rows]


def _with(rows: Rows, column: str, value: str) -> Rows:
    """The value in the first row."""
    at = rows[0].index(column)
    return [rows[0], [*rows[1][:at], value, *rows[1][at + 1 :]], *rows[2:]]


class Table(NamedTuple):
    """A table of the good inputs, and the command and flag that read it.

    Attributes:
        texts, numbers: columns that must be there, and those that must hold numbers.
        is_lenient: rows that are wrong are left out, with a word, where enough others are right.
    """

    command: Command
    flag: str
    file: str
    needed: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    is_lenient: bool = False


CLIPS = ("clips.csv", ("path",), ("num_frames", "height", "width", "fps"), True)
TABLE = Command("tools/data/table.py", ("--out", "out.csv"))
TABLES = (
    Table(commands.FROM_TABLE, "--dataset.data-path", "prompts.csv", ("text",), ("seed",)),
    Table(commands.TRAIN, "--dataset.data-path", "clips.csv", ("path", "text"), CLIPS[2], True),
    Table(commands.TRAIN, "--validation.data_path", "clips.csv", ("path", "text"), CLIPS[2], True),
    Table(commands.CACHE, "--dataset.data-path", "clips.csv", ("path", "text"), CLIPS[2], True),
    Table(commands.VAE_TRAIN, "--dataset.data-path", *CLIPS),
    Table(commands.VAE_INFERENCE, "--dataset.data-path", *CLIPS),
    Table(commands.VAE_STATS, "--dataset.data-path", *CLIPS),
    Table(commands.META, "--input", "clips.csv", ("path",), (), True),
    Table(commands.DATA, "--input", "clips.csv", ("path",)),
    Table(TABLE, "", "clips.csv", ()),
)
# name -> content of the file, whether rows may be left out instead
Change = tuple[str, Callable[[Rows], bytes], bool]


def changes(table: Table) -> Iterator[Change]:
    """What is done to a table."""

    def text(change: Callable[[Rows], Rows]) -> Callable[[Rows], bytes]:
        return lambda rows: _text(change(rows)).encode()

    yield "nothing", lambda rows: b"", False
    yield "two of a name", text(lambda rows: [[*row, row[0]] for row in rows]), False
    yield "longer row", text(lambda rows: [rows[0], [*rows[1], "moving right"], *rows[2:]]), False
    yield "zeros", lambda rows: b"\0" * 4000, False
    yield "picture", lambda rows: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, False
    yield "wide", lambda rows: _text(rows).encode("utf-16"), False
    yield "broken quote", lambda rows: _text(rows[:1]).encode() + b'"a', True
    if table.needed:
        yield "no rows", text(lambda rows: rows[:1]), False
        yield "latin", lambda rows: _text(_with(rows, table.needed[-1], "café")).encode("latin-1"), table.is_lenient
    for column in table.needed:
        yield f"no {column}", text(lambda rows, column=column: _without(rows, column)), False
        yield f"all {column} empty", text(lambda rows, c=column: [rows[0], *_all(rows, c, "")]), False
        yield f"one {column} empty", text(lambda rows, c=column: _with(rows, c, "")), table.is_lenient
    if "path" in table.needed:
        for label, value in (("missing", "gone.mp4"), ("long", "n" * 300), ("folder", "/"), ("device", "/dev/null")):
            yield f"path {label}", text(lambda rows, v=value: _with(rows, "path", v)), True
            yield f"all paths {label}", text(lambda rows, v=value: [rows[0], *_all(rows, "path", v)]), False
    for column in table.numbers:
        for value in ("x", "nan", "inf", "-5", "1e30", "2.5"):
            lenient = table.is_lenient or value == "1e30"
            yield f"{column} {value}", text(lambda rows, c=column, v=value: _with(rows, c, v)), lenient


def _all(rows: Rows, column: str, value: str) -> Rows:
    at = rows[0].index(column)
    return [[*row[:at], value, *row[at + 1 :]] for row in rows[1:]]


def cases() -> list[Case]:
    """Every table with everything that is wrong with it."""
    return [_case(table, *change) for table in TABLES for change in changes(table)]


def _case(table: Table, label: str, content: Callable[[Rows], bytes], may_pass: bool) -> Case:
    def make(good: Path, own: Path) -> None:
        with (good / table.file).open(newline="") as file:
            rows = list(csv.reader(file))
        (own / "t.csv").write_bytes(content(rows))

    words = table.command.with_path("{case}/t.csv", table.flag)
    name = f"{table.command.script}-{table.flag}-table-{label}"
    may_pass = may_pass or (table.command == commands.DATA and label.startswith("all path"))
    may_pass = may_pass or (table.is_lenient and label == "all text empty")  # texts may be left out
    leaves = "out_broken.csv" if table.command == commands.META else ""
    return Case(name, table.command.script, words, r"t\.csv", make, may_pass, leaves=leaves)
