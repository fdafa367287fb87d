"""Groups of gloo processes that run many checks each: starting processes costs more than the checks."""

import faulthandler
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers.forks import forked
from tests.helpers.seeds import seed

Check = Callable[[Path], Any]
"""Run by every rank with a folder they share; raises what is wrong."""

IDLE = 120  # seconds in which processes that wait for one another use next to no processor, and others use some


def _run_rank(rank: int, size: int, folder: str, checks: Sequence[Check]) -> None:
    torch.set_num_threads(1)
    shared = Path(folder)
    faulthandler.enable((shared / f"{rank}.crash").open("w"))
    # a rank may be late by as much as the machine is busy; hangs are seen from outside, see `Group`
    dist.init_process_group(
        "gloo", init_method=f"file://{shared / 'rendezvous'}", rank=rank, world_size=size, timeout=timedelta(hours=1)
    )
    for check in checks:
        place = shared / check.__name__
        place.mkdir(exist_ok=True)
        seed(check.__name__)  # the same on all ranks
        try:
            check(place)
        except BaseException:
            (shared / f"{check.__name__}.{rank}.failed").write_text(traceback.format_exc())
            raise SystemExit(1) from None
        (shared / f"{check.__name__}.{rank}.passed").touch()
    dist.barrier()
    dist.destroy_process_group()


def _lead(size: int, folder: str, checks: Sequence[Check], prepare: Callable[[], Any], idle: float) -> None:
    """Forks the ranks: what they all need is imported here, once."""
    prepare()
    forks = multiprocessing.get_context("fork")
    ranks = [forks.Process(target=_run_rank, args=(i, size, folder, checks)) for i in range(size)]
    for process in ranks:
        process.start()
    _attend(ranks, idle)
    exits = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    (Path(folder) / "exits.json").write_text(json.dumps(exits))


def nothing() -> None:
    """Nothing is to be prepared."""


class Group:
    """Outcome of a group of processes.

    Args:
        size: number of processes.
        checks: run in this order; the first that fails on any rank, or hangs, ends the group.
        prepare: called in the process that the others are forked from.
    """

    def __init__(self, size: int, checks: Sequence[Check], prepare: Callable[[], Any] = nothing) -> None:
        self.size = size
        self._holder = tempfile.TemporaryDirectory()
        self.folder = Path(self._holder.name)
        forked(_lead, size, str(self.folder), checks, prepare, IDLE).join()
        ends = self.folder / "exits.json"
        self.exits = json.loads(ends.read_text()) if ends.is_file() else "unknown: the first process has failed"

    def passed(self, check: Check) -> None:
        """Fail the calling test if ``check`` failed on some rank, with that rank's traceback."""
        name = check.__name__
        for failure in sorted(self.folder.glob(f"{name}.*.failed")):
            pytest.fail(f"{failure.stem}\n{failure.read_text()}", pytrace=False)
        missing = [rank for rank in range(self.size) if not (self.folder / f"{name}.{rank}.passed").exists()]
        if missing:
            crashes = "\n".join(path.read_text() for path in sorted(self.folder.glob("*.crash")))
            pytest.fail(
                f"{name} did not finish on ranks {missing} (they hang, or an earlier check failed); exit codes "
                f"{self.exits}\n{crashes}",
                pytrace=False,
            )


def _attend(ranks: Sequence[Any], idle: float) -> None:
    """Return when all processes have ended, one has failed, or they wait for one another.

    A clock does not tell that from a busy machine; their processor time does.
    """
    used, since = 0.0, time.monotonic()
    while alive := [process for process in ranks if process.is_alive()]:
        if any(process.exitcode for process in ranks):
            time.sleep(1)  # the others may have something to say about the same check
            return
        multiprocessing.connection.wait([process.sentinel for process in alive], timeout=1)
        now = sum(_processor_seconds(process.pid) for process in alive)
        if abs(now - used) > 1:  # less than before when one has ended
            used, since = now, time.monotonic()
        elif time.monotonic() - since > idle:
            return


def _processor_seconds(number: int) -> float:
    try:
        times = psutil.Process(number).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


@cache
def group_of(size: int, checks: tuple[Check, ...], prepare: Callable[[], Any]) -> Group:
    """The group that has run these checks: started by the first test that asks for it."""
    return Group(size, checks, prepare)


def in_groups(
    processes: Mapping[int, Sequence[Check]], needs: str | None = None, prepare: Callable[[], Any] = nothing
) -> Callable[[int, Check], None]:
    """A test per check, for a module of tests to call ``test_processes`` (see `tests.conftest`).

    Args:
        processes: checks by the size of the group that runs them.
        needs: package without which they are skipped.
        prepare: see `Group`.
    """
    pairs = [
        pytest.param(size, check, id=f"{size}-{check.__name__}")
        for size, checks in processes.items()
        for check in checks
    ]

    @pytest.mark.parallel
    @pytest.mark.parametrize(("size", "check"), pairs)
    def test(size: int, check: Check) -> None:
        if needs is not None and importlib.util.find_spec(needs) is None:
            pytest.skip(f"{needs} is not installed")
        group_of(size, tuple(processes[size]), prepare).passed(check)

    return test


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", limit: float = 1e-5) -> None:
    """Norm of the difference at most ``limit`` times the expected norm."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = (actual - expected).norm().item()
    bound = limit * max(expected.norm().item(), 1e-2)
    assert error <= bound, f"{name}: differs by {error:.2e}, allowed {bound:.2e}"
