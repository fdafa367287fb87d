"""Groups of gloo processes that run many checks each: starting processes costs more than the checks."""

import importlib.util
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

Check = Callable[[Path], Any]
"""Run by every rank with a folder they share; raises what is wrong."""

# Children are forked from one server that has imported torch and has no threads yet.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOAD = [
    "pytest",
    "torch._dynamo",  # optimizers and DDP import it, which takes seconds
    "opensora.acceleration.native",
    "opensora.diffusion.generate",
    "opensora.training.trainer",
]


def _run_rank(rank: int, size: int, folder: str, checks: Sequence[Check]) -> None:
    torch.set_num_threads(1)
    shared = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{shared / 'rendezvous'}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    for check in checks:
        place = shared / check.__name__
        place.mkdir(exist_ok=True)
        try:
            check(place)
        except BaseException:
            (shared / f"{check.__name__}.{rank}.failed").write_text(traceback.format_exc())
            raise SystemExit(1) from None
        (shared / f"{check.__name__}.{rank}.passed").touch()
    dist.barrier()
    dist.destroy_process_group()


class Group:
    """Outcome of a group of processes.

    Args:
        size: number of processes.
        checks: run in this order; the first that fails on any rank ends the group.
        seconds: limit for all of them.
    """

    def __init__(self, size: int, checks: Sequence[Check], seconds: float = 120) -> None:
        PROCESSES.set_forkserver_preload(PRELOAD)
        self.size = size
        self._holder = tempfile.TemporaryDirectory()
        self.folder = Path(self._holder.name)
        ranks = [PROCESSES.Process(target=_run_rank, args=(i, size, str(self.folder), checks)) for i in range(size)]
        for process in ranks:
            process.start()
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in ranks) and time.monotonic() < end:
            if any(process.exitcode for process in ranks):
                time.sleep(1)  # the others may have something to say about the same check
                break
            time.sleep(0.02)
        for process in ranks:
            process.kill()
            process.join()

    def passed(self, check: Check) -> None:
        """Fail the calling test if ``check`` failed on some rank, with that rank's traceback."""
        name = check.__name__
        for failure in sorted(self.folder.glob(f"{name}.*.failed")):
            pytest.fail(f"{failure.stem}\n{failure.read_text()}", pytrace=False)
        missing = [rank for rank in range(self.size) if not (self.folder / f"{name}.{rank}.passed").exists()]
        if missing:
            pytest.fail(f"{name} did not finish on ranks {missing} (time, or an earlier failure)", pytrace=False)


@cache
def group_of(size: int, checks: tuple[Check, ...], seconds: float) -> Group:
    """The group that has run these checks: started by the first test that asks for it."""
    return Group(size, checks, seconds)


def in_groups(
    processes: Mapping[int, Sequence[Check]], seconds: float = 120, needs: str | None = None
) -> Callable[[int, Check], None]:
    """A test per check, for a module of tests to give a name to.

    Args:
        processes: checks by the size of the group that runs them.
        seconds: limit of each group.
        needs: package without which they are skipped.
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
        group_of(size, tuple(processes[size]), seconds).passed(check)

    return test


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", limit: float = 1e-5) -> None:
    """Norm of the difference at most ``limit`` times the expected norm."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = (actual - expected).norm().item()
    bound = limit * max(expected.norm().item(), 1e-2)
    assert error <= bound, f"{name}: differs by {error:.2e}, allowed {bound:.2e}"
