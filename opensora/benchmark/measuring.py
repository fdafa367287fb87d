"""Time and peak memory of one run, on the CPU and on a GPU, and tables of them."""

import contextlib
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from opensora.utils.errors import UserError

MIB = 2**20
Given = ParamSpec("Given")
Result = TypeVar("Result")


def in_own_process(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """The result of a call in a new process with as many threads as this one.

    Memory has to be measured there: what earlier runs freed stays with their process, and the next run reuses it
    unseen. Function, arguments and result must be picklable.
    """
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(function, *args, **kwargs).result()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one run, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def resident_bytes(field: str) -> int:
    """A memory figure of this process from Linux: "VmRSS" now, "VmHWM" at most since the start or `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"this system does not report {field}: memory on the CPU can be measured on Linux only")


def give_back_freed() -> None:
    """Give what was freed back to the system (glibc keeps it), or the next run would seem to need less."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """Collects into the list, at the end, the bytes that the body needed at most beyond those in use before."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    give_back_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    except OSError:  # not allowed: what building the model needed at most is the baseline then
        before = resident_bytes("VmHWM")
    else:
        before = resident_bytes("VmRSS")
    yield found
    found.append(resident_bytes("VmHWM") - before)


def tensor_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors that a run on the CPU holds at a time, beyond those from before it: exact and repeatable.

    `peak_of` counts what the process holds, which also is the libraries' working memory and what an allocator keeps.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the rows' single values, one column per key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "seconds"))

    def cell(value: Any) -> str:
        return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)

    lines = [keys, ["---"] * len(keys), *([cell(row.get(key, "")) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
