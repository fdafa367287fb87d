"""Runs a chain of stages over a folder: does what is missing, joins the results, keeps count."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import UNFINISHED, write_beside
from opensora.utils.logging import get_logger
from opensora.utils.progress import Bar
from tools.data.engine.funnel import FUNNEL_FILE, FunnelStep, funnel_json
from tools.data.engine.own_files import OwnFiles
from tools.data.engine.runners import Job, Runner
from tools.data.engine.stage import PixelStage, Stage, TableStage
from tools.data.engine.store import ERROR, INDEX, KEY, Failure, StageStore
from tools.data.engine.tables import read_table
from tools.outputs import check_place

logger = get_logger(__name__)

ROW = "_row"
# what tempfile makes of write_beside's prefix and the ending of a file of ours
LEFTOVER = re.compile(re.escape(UNFINISHED) + r"[a-z0-9_]{8}\.(parquet|json|csv|png|jpg|mp4)")
INTERNAL = (ROW, KEY, INDEX, "_active")
STATUS_COLUMNS = {"keep": pl.Boolean, "reason": pl.String, "error": pl.String, "error_stage": pl.String}
TABLE_FILE = "table.parquet"


@dataclass(frozen=True)
class Plan:
    """What a dry run says of a stage: rows in, and how many of them are still to be done (None: not known yet)."""

    stage: str
    rows: int | None
    pending: int | None


def group_stages(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Neighbouring pixel stages together, as far as none reads what another of its group adds; others alone."""
    groups: list[list[Stage]] = []
    for stage in stages:
        last = groups[-1] if groups else []
        added = {column for member in last for column in member.adds}
        if last and all(isinstance(s, PixelStage) for s in (*last, stage)) and not added & set(stage.reads):
            last.append(stage)
        else:
            groups.append([stage])
    return groups


class Pipeline:
    """A chain of stages on one output folder.

    Args:
        stages: in order; each may read what those before it added.
        root: output folder.
        runner: where rows are worked on.
        retry_errors: do rows again that failed before.
        progress: show a bar per group.
        own: what of the folder was written by these tools, and may be replaced; none finds out.

    Raises:
        UserError: a stage reads a column that none before it adds, or its ``check`` fails.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        root: Path,
        runner: Runner,
        retry_errors: bool = False,
        progress: bool = True,
        own: OwnFiles | None = None,
    ) -> None:
        self.stages, self.root, self.runner = list(stages), root, runner
        self.retry_errors, self.progress = retry_errors, progress
        self.own = own or OwnFiles(root)
        self.funnel: list[FunnelStep] = []

    def check(self, columns: Sequence[str]) -> None:
        """Raise a UserError for a chain that cannot work on a table with these columns, or in this folder."""
        check_place(self.root, "--output", folder=True)
        self.own.claim(TABLE_FILE, FUNNEL_FILE)
        for folder in ("stages", *(folder for stage in self.stages for folder in stage.folders)):
            check_place(self.root / folder, "--output", folder=True)
        known = {*columns, *STATUS_COLUMNS}
        for stage in self.stages:
            missing = [column for column in stage.reads if column not in known]
            if missing:
                raise UserError(
                    f"stage '{stage.name}' reads column '{missing[0]}', which no stage before it adds; "
                    f"the chain is {', '.join(s.name for s in self.stages)}"
                )
            stage.check()
            known |= set(stage.adds)

    def run(self, table: pl.DataFrame) -> pl.DataFrame:
        """Do what is missing and give the whole table, which is also written to ``ROOT/table.parquet``.

        Raises:
            UserError: wrong chain, or another run is at work in the folder.
        """
        self.check(table.columns)
        table = with_status(table)
        with claimed(self.root, advice="wait for it or choose another --output"):
            folders = {"stages", "clips", "frames", "report"}.union(*(stage.folders for stage in self.stages))
            remove_leftovers(self.root, folders)
            table = self._run_all(table)
            remove_leftovers(self.root, folders)  # of a worker that died on the way
            self.own.write(TABLE_FILE, table.write_parquet)
            return table

    def _run_all(self, table: pl.DataFrame) -> pl.DataFrame:
        self.funnel = []
        for group in group_stages(self.stages):
            if isinstance(group[0], TableStage):
                table = self._run_table(group[0], table)
            else:
                table = self._run_group(group, table)
        return table

    # ------------------------------------------------------------------------------------------------ rows

    def _run_group(self, group: Sequence[Stage], table: pl.DataFrame) -> pl.DataFrame:
        stores = {stage.name: StageStore(stage) for stage in group}
        for store in stores.values():
            store.open()
        keys = {stage.name: row_keys(stage, table) for stage in group}
        done = {name: store.done(self.retry_errors) for name, store in stores.items()}
        active = table.filter(is_active()).height
        pending = {name: len({k for k in keys[name] if k is not None} - done[name]) for name in keys}
        steps = [FunnelStep(name, active, done_before=active - pending[name]) for name in keys]
        self.funnel += steps
        self._save_funnel()
        label = "+".join(keys)
        total = sum(1 for _ in jobs_of(group, table, keys, done))
        if total:
            self._work(group, stores, jobs_of(group, table, keys, done), total, label)
        for stage, step in zip(group, steps):
            before = table
            table = stage.finish(join(table, stage, keys[stage.name], stores[stage.name].load()))
            self._count(step, stage, before, table)
        return table

    def _work(
        self, group: Sequence[Stage], stores: dict[str, StageStore], jobs: Iterator[Job], total: int, label: str
    ) -> None:
        failed = 0
        try:
            with Bar(total=total, desc=label, unit="row", disable=not self.progress) as bar:
                for job, outcomes in self.runner.run(group, jobs):
                    for name, outcome in outcomes.items():
                        stores[name].add(job.keys[name], outcome)
                    failed += any(isinstance(outcome, Failure) for outcome in outcomes.values())
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update()
        finally:
            for store in stores.values():
                store.flush()

    def _run_table(self, stage: TableStage, table: pl.DataFrame) -> pl.DataFrame:
        step = FunnelStep(stage.name, table.filter(is_active()).height)
        self.funnel.append(step)
        before = table
        table = judge_table(stage, table)
        target = stage.root / "stages" / stage.name / "table.parquet"
        names = [name for name in ("clip_id", *stage.adds) if name in table.columns]
        write_beside(target, table.select(names).write_parquet)
        self._count(step, stage, before, table)
        return table

    # ------------------------------------------------------------------------------------------------ counting

    def _count(self, step: FunnelStep, stage: Stage, before: pl.DataFrame, after: pl.DataFrame) -> None:
        # fewer than at the group's start where a stage that shares its decoding failed on a row
        step.rows_in = before.filter(is_active()).height
        step.rows_out = after.filter(is_active()).height
        step.failed = after.filter(pl.col("error_stage") == stage.name).height
        was, now = _reasons(before), _reasons(after)
        step.dropped = {reason: n - was.get(reason, 0) for reason, n in now.items() if n > was.get(reason, 0)}
        step.finished = True
        self._save_funnel()

    def _save_funnel(self) -> None:
        self.own.write_text(FUNNEL_FILE, funnel_json(self.funnel))

    def plan(self, table: pl.DataFrame) -> list[Plan]:
        """What ``run`` would do, without doing it. What depends on rows still to be made is not known."""
        self.check(table.columns)
        table, plans, known = with_status(table), [], True
        for group in group_stages(self.stages):
            if not known:
                plans += [Plan(stage.name, None, None) for stage in group]
                continue
            active = table.filter(is_active()).height
            if isinstance(group[0], TableStage):
                plans.append(Plan(group[0].name, active, 0))
                table = judge_table(group[0], table)
                continue
            for stage in group:
                store, keys = StageStore(stage), row_keys(stage, table)
                pending = len({key for key in keys if key is not None} - store.done(self.retry_errors))
                plans.append(Plan(stage.name, active, pending))
                known = known and pending == 0
            for stage in group if known else ():
                table = stage.finish(join(table, stage, row_keys(stage, table), StageStore(stage).load()))
        return plans


def remove_leftovers(root: Path, folders: Iterable[str]) -> None:
    """Delete what a killed run or worker left half-written: files with the names that ``write_beside`` gives, in the
    folder itself and in those where stages write."""
    for path in root.glob(f"{UNFINISHED}*"):
        _remove_leftover(path)
    for name in folders:
        for folder, _, files in os.walk(root / name):
            for file in files:
                _remove_leftover(Path(folder, file))


def _remove_leftover(path: Path) -> None:
    if LEFTOVER.fullmatch(path.name) and path.is_file():
        path.unlink()


def with_status(table: pl.DataFrame) -> pl.DataFrame:
    """The table with the columns every stage may count on: keep, reason, error, error_stage.

    Raises:
        UserError: the table came with such a column of another kind, or with one of a name that is used inside.
    """
    taken = [name for name in table.columns if name in INTERNAL or name.startswith("_new_")]
    if taken:
        raise UserError(f"the input table's column '{taken[0]}' has a name that is used inside; rename it")
    for name in (name for name in STATUS_COLUMNS if name in table.columns):
        try:
            table = table.with_columns(pl.col(name).cast(STATUS_COLUMNS[name]))
        except pl.exceptions.PolarsError:
            expected = "true or false" if STATUS_COLUMNS[name] == pl.Boolean else "text"
            kind = table[name].dtype
            raise UserError(f"the input table's column '{name}' is {kind}: expected {expected}; rename it") from None
    defaults = {"keep": True, "reason": "", "error": None, "error_stage": None}
    missing = [
        pl.lit(value, STATUS_COLUMNS[name]).alias(name) for name, value in defaults.items() if name not in table.columns
    ]
    return table.with_columns(missing)


def read_result(root: Path) -> pl.DataFrame:
    """The whole table of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (root / TABLE_FILE).is_file():
        raise UserError(f"{root / TABLE_FILE}: no such file; run tools/data/run.py CONFIG --output {root} first")
    return read_table(root / TABLE_FILE, ("path", *STATUS_COLUMNS))


def is_active() -> pl.Expr:
    """Rows that are still in: neither dropped nor failed."""
    return pl.col("keep") & pl.col("error").is_null()


def row_keys(stage: Stage, table: pl.DataFrame) -> list[str | None]:
    """Key of every row for a stage, None for rows that are out."""
    active = table.select(is_active().alias("active"))["active"].to_list()
    rows = table.select(stage.identity).iter_rows(named=True)
    return [stage.key(row) if ok else None for ok, row in zip(active, rows)]


def jobs_of(
    group: Sequence[Stage], table: pl.DataFrame, keys: dict[str, list[str | None]], done: dict[str, set[str]]
) -> Iterator[Job]:
    """One job per row that some stage of the group has no result for; equal keys are done once."""
    reads = list(dict.fromkeys(column for stage in group for column in stage.reads))
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(table.select(reads).iter_rows(named=True)):
        wanted: dict[str, str] = {}
        for name, column in keys.items():
            key = column[number]
            if key is not None and key not in done[name] and (name, key) not in seen:
                seen.add((name, key))
                wanted[name] = key
        if wanted:
            yield Job(row, wanted)


def join(table: pl.DataFrame, stage: Stage, keys: Sequence[str | None], results: pl.DataFrame) -> pl.DataFrame:
    """The table with a stage's results; rows that are out stay as they are, rows that failed get ``error``.

    Where stages that share a decoding all fail on a row, the first one's error stays.
    """
    table = table.with_row_index(ROW).with_columns(pl.Series(KEY, keys, pl.String))
    clash = {name: f"_new_{name}" for name in (*stage.adds, ERROR)}
    joined = table.join(results.rename(clash), on=KEY, how="left").sort(ROW, INDEX)
    did = pl.col(KEY).is_not_null()
    failed = did & pl.col(f"_new_{ERROR}").is_not_null()
    first = failed & pl.col("error").is_null()
    columns = [
        pl.when(first).then(pl.col(f"_new_{ERROR}")).otherwise(pl.col("error")).alias("error"),
        pl.when(first).then(pl.lit(stage.name)).otherwise(pl.col("error_stage")).alias("error_stage"),
    ]
    for name in stage.adds:
        new = pl.col(f"_new_{name}")
        use = did & ~failed
        old = pl.col(name) if name in table.columns else pl.lit(None, stage.adds[name])
        columns.append(pl.when(use).then(new).otherwise(old).alias(name))
    return joined.with_columns(columns).drop(ROW, KEY, INDEX, *clash.values())


def judge_table(stage: TableStage, table: pl.DataFrame) -> pl.DataFrame:
    """The table with a table stage's columns laid over those of the rows that are in."""
    table = table.with_row_index(ROW).with_columns(is_active().alias("_active"))
    result = stage.run_table(table.filter("_active"))
    clash = {name: f"_new_{name}" for name in stage.adds}
    new = result.select(ROW, *(pl.col(name).cast(kind).alias(clash[name]) for name, kind in stage.adds.items()))
    joined = table.join(new, on=ROW, how="left", maintain_order="left")
    columns = []
    for name, laid in clash.items():
        old = pl.col(name) if name in table.columns else pl.lit(None, stage.adds[name])
        columns.append(pl.when("_active").then(pl.col(laid)).otherwise(old).alias(name))
    return stage.finish(joined.with_columns(columns).drop(ROW, "_active", *clash.values()))


def _reasons(table: pl.DataFrame) -> dict[str, int]:
    counts = table.filter(~pl.col("keep") & pl.col("error").is_null()).group_by("reason").len()
    return dict(sorted(counts.iter_rows()))
