"""Where the work of a stage is done: in this process, in a pool of processes, or (``ray_runner``) on a cluster."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

from opensora.utils.errors import UserError
from opensora.utils.temporary import keep_sockets
from tools.data.engine.decode import PixelWorker
from tools.data.engine.process import prepare
from tools.data.engine.stage import PixelStage, Row, Stage
from tools.data.engine.store import Failure, Outcome

AHEAD = 4  # jobs handed out per worker: enough that none waits, few enough to stay in memory
DIED = "the process working on this died (out of memory, or a crash in a codec)"


@dataclass(frozen=True)
class Job:
    """One row, and under which key each stage of a group wants its result."""

    row: Row
    keys: Mapping[str, str] = field(default_factory=dict)


Outcomes = dict[str, Outcome]
Work = Callable[[Job], Outcomes]


def describe_error(error: Exception) -> str:
    """One line for the table: our own messages as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def make_work(stages: Sequence[Stage]) -> Work:
    """The function that does a job for a group of stages; models are loaded here."""
    if isinstance(stages[0], PixelStage):
        return _pixel_work([stage for stage in stages if isinstance(stage, PixelStage)])
    (stage,) = stages
    worker = stage.worker()

    def work(job: Job) -> Outcomes:
        try:
            return {stage.name: worker(job.row)}
        except Exception as error:  # whatever a row does to us, the others go on
            return {stage.name: Failure(describe_error(error))}

    return work


def _pixel_work(stages: Sequence[PixelStage]) -> Work:
    worker = PixelWorker(stages)

    def work(job: Job) -> Outcomes:
        results = worker(job.row, set(job.keys))
        return {name: Failure(describe_error(r)) if isinstance(r, Exception) else [r] for name, r in results.items()}

    return work


class Runner(Protocol):
    """Runs jobs in any order."""

    def run(self, stages: Sequence[Stage], jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcomes]]:
        """Every job with its outcomes, as they come."""
        ...


@dataclass(frozen=True)
class LocalRunner:
    """This machine.

    Args:
        workers: processes; 0 works in this one, which is what a debugger wants.
    """

    workers: int

    def run(self, stages: Sequence[Stage], jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcomes]]:
        """Every job with its outcomes, as they come."""
        if stages[0].concurrency:
            yield from self._threads(stages, jobs)
        elif self.workers == 0:
            prepare()
            work = make_work(stages)
            for job in jobs:
                yield job, work(job)
        else:
            yield from self._processes(stages, jobs)

    def _threads(self, stages: Sequence[Stage], jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcomes]]:
        threads = stages[0].concurrency
        work = make_work(stages)
        pool = ThreadPoolExecutor(threads)
        try:
            yield from _bounded(lambda job: pool.submit(work, job), iter(jobs), threads * 2)
        finally:
            pool.shutdown(cancel_futures=True)

    def _processes(self, stages: Sequence[Stage], jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcomes]]:
        rest = iter(jobs)
        workers = min([self.workers, *(most for stage in stages if (most := stage.most_workers()) is not None)])
        while True:
            flying: list[Job] = []
            pool = make_pool(stages, workers)
            try:
                yield from _bounded(lambda job: pool.submit(do_job, job), rest, workers * AHEAD, flying)  # noqa: B023
                return
            except BrokenProcessPool:
                pass
            finally:
                pool.shutdown(cancel_futures=True)
            # One of these killed its process. Each gets a process of its own, so that the others are done all the same.
            for job in flying:
                yield job, self._alone(stages, job)

    def _alone(self, stages: Sequence[Stage], job: Job) -> Outcomes:
        with make_pool(stages, 1) as pool:
            try:
                return pool.submit(do_job, job).result()
            except BrokenProcessPool:
                return {name: Failure(DIED) for name in job.keys}


def _bounded(
    submit: Callable[[Job], "Future[Outcomes]"], jobs: Iterator[Job], ahead: int, flying: list[Job] | None = None
) -> Iterator[tuple[Job, Outcomes]]:
    """Outcomes as they come, with no more than ``ahead`` jobs handed out; ``flying`` is kept up to date with them."""
    futures: dict[Future[Outcomes], Job] = {}
    by_id: dict[int, Job] = {}
    try:
        while True:
            for job in islice(jobs, ahead - len(futures)):
                by_id[id(job)] = job
                futures[submit(job)] = job
            if not futures:
                return
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                outcomes = future.result()
                job = futures.pop(future)
                del by_id[id(job)]
                yield job, outcomes
    finally:
        if flying is not None:
            flying.extend(by_id.values())


# A worker process holds its work here; the pool's functions have no other place to keep loaded models.
_work: list[Work] = []


def make_pool(stages: Sequence[Stage], workers: int, sharing: int | None = None) -> ProcessPoolExecutor:
    """Processes that have loaded the stages and take jobs by ``do_job``.

    Args:
        stages: a group.
        workers: processes.
        sharing: how many processes work on this machine in all; none takes ``workers``.
    """
    # Forking this process hangs (polars and torch have threads); a server that has imported everything and started
    # nothing forks safely and fast. Where there is none (Windows), every worker imports for itself.
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    keep_sockets()
    if kind == "forkserver":
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _start, (list(stages), sharing or workers))


def _start(stages: list[Stage], sharing: int) -> None:
    prepare(sharing)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work[:] = [make_work(stages)]
    except Exception as error:  # told to whoever asks for work: an exception here would only say "broken pool"
        _work[:] = [partial(_refuse, UserError(f"stage '{stages[0].name}' cannot start: {describe_error(error)}"))]


def _refuse(error: Exception, job: Job) -> Outcomes:
    raise error


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def do_job(job: Job) -> Outcomes:
    """A job, in a process of ``make_pool``."""
    return _work[0](job)
