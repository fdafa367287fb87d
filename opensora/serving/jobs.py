"""Jobs and what became of them, in SQLite: they outlive the processes that make them.

Every change of a job is one transaction. A job in progress belongs to one attempt of one worker: whatever a worker
writes of a job that was cancelled, deleted or started again meanwhile is refused, and so it learns of that.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.utils.errors import UserError

QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = "queued", "in_progress", "completed", "failed", "cancelled"
OPEN = (QUEUED, IN_PROGRESS)
MOST_ATTEMPTS = 2  # a job that a crash interrupted is started again once
PATIENCE = 30.0  # seconds for another process's transaction
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0,
  created REAL NOT NULL, started REAL, finished REAL, shape TEXT NOT NULL,
  request TEXT NOT NULL, facts TEXT NOT NULL, error TEXT, seconds TEXT);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, number);
CREATE TABLE IF NOT EXISTS totals (name TEXT, label TEXT, value REAL NOT NULL, PRIMARY KEY (name, label));
"""


class QueueFull(UserError):
    """As many jobs are waiting as may."""


class Gone(Exception):
    """A job does not belong to this attempt any more: cancelled, deleted, or started again elsewhere."""


@dataclass(frozen=True)
class Job:
    """A row.

    Attributes:
        number: order of arrival.
        id: name that clients know.
        owner: who asked for it: a browser, or "" for programs.
        status: ``queued``, ``in_progress``, ``completed``, ``failed`` or ``cancelled``.
        attempts: how often it was started.
        step, steps: of the sampler, done and in all.
        created, started, finished: seconds since the epoch.
        shape: jobs of equal shape may be made at a time.
        request: fields that differ from their defaults, the names of uploads among them.
        facts: what was settled at its arrival: sizes, frames, steps, seed.
        error: ``code`` and ``message`` of a job that failed or was cancelled.
        seconds: by stage.
    """

    number: int
    id: str
    owner: str
    status: str
    attempts: int
    step: int
    steps: int
    created: float
    started: float | None
    finished: float | None
    shape: str
    request: dict[str, Any]
    facts: dict[str, Any]
    error: dict[str, str] | None
    seconds: dict[str, float]

    @classmethod
    def of(cls, row: sqlite3.Row) -> "Job":
        """The job of a row."""
        values = dict(row)
        for name in ("request", "facts", "error", "seconds"):
            values[name] = json.loads(values[name]) if values[name] else None
        return cls(**{**values, "seconds": values["seconds"] or {}})

    @property
    def is_open(self) -> bool:
        """Whether it is still to be made."""
        return self.status in OPEN

    @property
    def progress(self) -> int:
        """Percent: 100 once it is completed, and not before."""
        if self.status == COMPLETED:
            return 100
        return min(int(100 * self.step / self.steps), 99) if self.steps else 0


def new_id() -> str:
    """A name that nobody guesses."""
    return f"video_{secrets.token_hex(16)}"


class JobStore:
    """The jobs of a folder. One instance serves all threads of a process; several processes may have one.

    Args:
        path: the database, made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        try:
            self._base = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._base.row_factory = sqlite3.Row
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be opened as the database of jobs ({error})") from error

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._base.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._base.execute(query, values).fetchall()

    def _jobs(self, query: str, *values: Any) -> list[Job]:
        return [Job.of(row) for row in self._rows(f"SELECT * FROM jobs {query}", *values)]

    # ------------------------------------------------------------------------------------------------------- clients

    def add(
        self,
        id: str,
        owner: str,
        shape: str,
        request: Mapping[str, Any],
        facts: Mapping[str, Any],
        steps: int,
        limit: int,
    ) -> Job:
        """Put a job at the end of the queue.

        Raises:
            QueueFull: ``limit`` jobs wait already.
        """
        row = (id, owner, QUEUED, steps, time.time(), shape, json.dumps(dict(request)), json.dumps(dict(facts)))
        with self._transaction() as base:
            waiting = base.execute("SELECT count(*) FROM jobs WHERE status = ?", (QUEUED,)).fetchone()[0]
            if waiting >= limit:
                raise QueueFull(f"{waiting} jobs are waiting, as many as may; try again later")
            base.execute(
                "INSERT INTO jobs (id, owner, status, steps, created, shape, request, facts) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        return self[id]

    def get(self, id: str) -> Job | None:
        """A job; None if there is none of this name."""
        return next(iter(self._jobs("WHERE id = ?", id)), None)

    def __getitem__(self, id: str) -> Job:
        job = self.get(id)
        if job is None:
            raise KeyError(id)
        return job

    def page(
        self, limit: int, after: Job | None = None, newest_first: bool = True, owner: str | None = None
    ) -> list[Job]:
        """At most ``limit`` jobs in the order of their arrival, those that follow ``after``."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where, values = ["1"], []
        for clause, value in ((f"number {sign} ?", after.number if after else None), ("owner = ?", owner)):
            if value is not None:
                where.append(clause)
                values.append(value)
        return self._jobs(f"WHERE {' AND '.join(where)} ORDER BY number {order} LIMIT ?", *values, limit)

    def place(self, job: Job) -> int:
        """How many jobs come before a waiting one, the running ones among them."""
        query = "SELECT count(*) FROM jobs WHERE status = ? OR (status = ? AND number < ?)"
        return self._rows(query, IN_PROGRESS, QUEUED, job.number)[0][0]

    def counts(self) -> dict[str, int]:
        """Jobs by status, of those that are kept."""
        found = {row[0]: row[1] for row in self._rows("SELECT status, count(*) FROM jobs GROUP BY status")}
        return {status: found.get(status, 0) for status in (QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED)}

    def cancel(self, id: str) -> bool:
        """Cancel a job that is not finished; says whether it was one. A worker that makes it stops at its next step."""
        error = json.dumps({"code": "cancelled", "message": "cancelled"})
        with self._transaction() as base:
            done = base.execute(
                "UPDATE jobs SET status = ?, finished = ?, error = ? WHERE id = ? AND status IN (?, ?)",
                (CANCELLED, time.time(), error, id, *OPEN),
            ).rowcount
            if done:
                _count(base, "finished", CANCELLED)
        return bool(done)

    def remove(self, id: str) -> None:
        """Forget a job, whatever its state."""
        with self._transaction() as base:
            base.execute("DELETE FROM jobs WHERE id = ?", (id,))

    def finished_before(self, moment: float) -> list[Job]:
        """Jobs whose results are older."""
        return self._jobs("WHERE finished < ?", moment)

    def ids(self) -> set[str]:
        """Names of all jobs."""
        return {row[0] for row in self._rows("SELECT id FROM jobs")}

    def totals(self, name: str) -> dict[str, float]:
        """What was counted under a name since the database was made, by label."""
        return {row[0]: row[1] for row in self._rows("SELECT label, value FROM totals WHERE name = ?", name)}

    # -------------------------------------------------------------------------------------------------------- worker

    def take(self, most: int = 1) -> list[Job]:
        """Start the first job that waits, and up to ``most - 1`` later ones of the same shape with it."""
        if not self._rows("SELECT 1 FROM jobs WHERE status = ? LIMIT 1", QUEUED):
            return []
        with self._transaction() as base:
            first = base.execute("SELECT * FROM jobs WHERE status = ? ORDER BY number LIMIT 1", (QUEUED,)).fetchone()
            if first is None:
                return []
            rows = base.execute(
                "SELECT id FROM jobs WHERE status = ? AND shape = ? ORDER BY number LIMIT ?",
                (QUEUED, first["shape"], most),
            ).fetchall()
            for row in rows:
                base.execute(
                    "UPDATE jobs SET status = ?, attempts = attempts + 1, step = 0, started = ? WHERE id = ?",
                    (IN_PROGRESS, time.time(), row["id"]),
                )
        return [job for row in rows if (job := self.get(row["id"])) is not None]

    def _change(self, base: sqlite3.Connection, job: Job, assignments: str, *values: Any) -> None:
        """Change a job that this attempt has.

        Raises:
            Gone: it has it no more.
        """
        query = f"UPDATE jobs SET {assignments} WHERE id = ? AND status = ? AND attempts = ?"
        if not base.execute(query, (*values, job.id, IN_PROGRESS, job.attempts)).rowcount:
            raise Gone(job.id)

    def advance(self, job: Job, step: int, steps: int) -> None:
        """Note the progress of a job.

        Raises:
            Gone: it was cancelled, deleted or started again.
        """
        with self._transaction() as base:
            self._change(base, job, "step = ?, steps = ?", step, steps)

    def complete(self, job: Job, facts: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """The result of a job is there.

        Raises:
            Gone: it was cancelled, deleted or started again.
        """
        with self._transaction() as base:
            self._change(
                *(base, job, "status = ?, finished = ?, step = steps, facts = ?, seconds = ?", COMPLETED, time.time()),
                *(json.dumps({**job.facts, **facts}), json.dumps(dict(seconds))),
            )
            _count(base, "finished", COMPLETED)
            for stage, value in seconds.items():
                _count(base, "stage_runs", stage)
                _count(base, "stage_seconds", stage, value)

    def fail(self, job: Job, code: str, message: str) -> None:
        """A job cannot be made.

        Raises:
            Gone: it was cancelled, deleted or started again.
        """
        with self._transaction() as base:
            self._fail(base, job, code, message)

    def _fail(self, base: sqlite3.Connection, job: Job, code: str, message: str) -> None:
        error = json.dumps({"code": code, "message": message})
        self._change(base, job, "status = ?, finished = ?, error = ?", FAILED, time.time(), error)
        _count(base, "finished", FAILED)
        _count(base, "failures", code)

    def give_back(self) -> Sequence[Job]:
        """Put jobs in progress back to where they were in the queue, as if they had not been started: the worker was
        told to stop."""
        jobs = self._jobs("WHERE status = ?", IN_PROGRESS)
        with self._transaction() as base:
            base.execute(
                "UPDATE jobs SET status = ?, attempts = attempts - 1, step = 0, started = NULL WHERE status = ?",
                (QUEUED, IN_PROGRESS),
            )
        return jobs

    def recover(self) -> None:
        """After the end of a worker that nobody told to stop: what it was making waits again, in its old place, or has
        failed if that has happened before."""
        for job in self._jobs("WHERE status = ?", IN_PROGRESS):
            with self._transaction() as base:
                try:
                    if job.attempts < MOST_ATTEMPTS:
                        self._change(base, job, "status = ?, step = 0, started = NULL", QUEUED)
                    else:
                        self._fail(base, job, "worker_ended", f"the worker ended {job.attempts} times while making it")
                except Gone:
                    continue


def _count(base: sqlite3.Connection, name: str, label: str, value: float = 1.0) -> None:
    base.execute(
        "INSERT INTO totals VALUES (?, ?, ?) ON CONFLICT (name, label) DO UPDATE SET value = value + excluded.value",
        (name, label, value),
    )
