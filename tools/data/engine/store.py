"""Results of a stage on disk: parquet shards keyed by row, written beside and renamed, so that they survive a kill."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from opensora.utils.errors import UserError, first_line
from opensora.utils.files import write_beside, write_text
from opensora.utils.logging import get_logger
from tools.data.engine.stage import Row, Stage
from tools.data.engine.tables import DAMAGED

logger = get_logger(__name__)

KEY, INDEX, ERROR = "_key", "_index", "_error"
FLUSH_ROWS, FLUSH_SECONDS = 2000, 10.0
COMPACT_SHARDS = 50
SHARD = re.compile(r"part-\d{8}\.parquet")


@dataclass(frozen=True)
class Failure:
    """Why a row has no result."""

    message: str


Outcome = list[Row] | Failure


class StageStore:
    """What one stage with one fingerprint has done so far, in ``ROOT/stages/NAME/FINGERPRINT``.

    Results of other settings lie in other folders and stay: going back to earlier settings costs nothing.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.folder = stage.root / "stages" / stage.name / stage.fingerprint()
        self.schema = {KEY: pl.String, INDEX: pl.Int32, ERROR: pl.String, **stage.adds}
        self._buffer: list[Row] = []
        self._flushed = time.monotonic()

    def open(self) -> None:
        """Make the folder and note what made it; say which settings differ from the last run's."""
        note = self.folder / "settings.json"
        if note.is_file():
            return
        others = sorted(self.folder.parent.glob("*/settings.json"), key=lambda path: path.stat().st_mtime)
        description = json.loads(json.dumps(self.stage.description(), default=str))
        if others:
            changes = ", ".join(_differences(_read_note(others[-1]), description)) or "which ones is not known"
            logger.warning("%s: other settings than before (%s), it runs again", self.stage.name, changes)
        write_text(json.dumps(description, indent=2, ensure_ascii=False), note)

    def shards(self) -> list[Path]:
        """Whole shards, oldest first."""
        return sorted(path for path in self.folder.glob("part-*.parquet") if SHARD.fullmatch(path.name))

    def load(self) -> pl.DataFrame:
        """All results; where a row was done again, the last one."""
        parts = []
        for number, path in enumerate(self.shards()):
            try:
                part = pl.read_parquet(path, glob=False)
                if part.schema != pl.Schema(self.schema):
                    raise ValueError("other columns than the stage writes")
            except DAMAGED as error:
                reason = first_line(error)
                raise UserError(f"{path} is damaged ({reason}); delete it and run again: it is regenerated") from error
            parts.append(part.with_columns(pl.lit(number).alias("_shard")))
        if not parts:
            return pl.DataFrame(schema=self.schema)
        table = pl.concat(parts)
        return table.filter(pl.col("_shard") == pl.col("_shard").max().over(KEY)).drop("_shard")

    def done(self, retry_errors: bool = False) -> set[str]:
        """Keys that need no work: they have a result, whose files are there."""
        table = self.load()
        if retry_errors:
            table = table.filter(pl.col(ERROR).is_null())
        return set(table[KEY].to_list()) - self._without_files(table)

    def _without_files(self, table: pl.DataFrame) -> set[str]:
        """Keys of results whose files somebody has deleted."""
        missing: set[str] = set()
        for column in self.stage.files:
            for key, value in table.select(KEY, column).iter_rows():
                names = [value] if isinstance(value, str) else value or ()
                if not all((self.stage.root / name).is_file() for name in names):
                    missing.add(key)
        return missing

    def add(self, key: str, outcome: Outcome) -> None:
        """Keep a row's result; a shard is written every so many rows or seconds."""
        if isinstance(outcome, Failure):
            self._buffer.append({KEY: key, INDEX: 0, ERROR: outcome.message})
        else:
            self._buffer += [{KEY: key, INDEX: index, ERROR: None, **row} for index, row in enumerate(outcome)]
        if len(self._buffer) >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet; merge shards when there are many."""
        self._flushed = time.monotonic()
        if self._buffer:
            self._write(pl.DataFrame(self._buffer, schema=self.schema, orient="row"))
            self._buffer = []
        old = self.shards()
        if len(old) > COMPACT_SHARDS:
            # The merged shard is the newest, so a kill between writing and deleting changes nothing.
            self._write(self.load())
            for path in old:
                path.unlink()

    def _write(self, table: pl.DataFrame) -> None:
        names = self.shards()
        number = int(names[-1].stem.split("-")[1]) + 1 if names else 0
        write_beside(self.folder / f"part-{number:08d}.parquet", table.write_parquet)


def _read_note(path: Path) -> Mapping[str, Any]:
    """What made a folder of results, as far as its note can be read; it is there for the message alone."""
    try:
        note = json.loads(path.read_text("utf-8"))
        return note if isinstance(note, Mapping) and isinstance(note.get("settings"), Mapping) else {}
    except (OSError, ValueError):
        return {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` of everything that two descriptions do not share."""
    if not old:
        return []
    flat_old, flat_new = ({**d, **d["settings"], "settings": None} for d in (old, new))
    keys = [key for key in {**flat_old, **flat_new} if flat_old.get(key) != flat_new.get(key)]
    return [f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}" for key in keys]
