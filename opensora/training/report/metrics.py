"""What a run shows while it trains: progress bar, log file, curves."""

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from opensora.acceleration.collectives import gather_values
from opensora.acceleration.parallel_context import ParallelContext
from opensora.training.report.tensorboard import TensorBoardTracker
from opensora.training.report.trackers import TrackedRun, Tracker
from opensora.utils.logging import get_logger
from opensora.utils.progress import Bar, duration

logger = get_logger(__name__)

GIB = 2**30
Number = float | Tensor


@dataclass(frozen=True)
class Mean:
    """A metric whose mean is taken over a known number of things: shown as total / count, left out at count 0."""

    total: Number
    count: Number


@dataclass(frozen=True)
class Rate:
    """An amount of work: shown per second of training, summed over the processes that do different samples.

    Attributes:
        amount: of this process; those that share its samples say the same.
        per_device: shown as the mean over all devices instead.
    """

    amount: Number
    per_device: bool = False


Value = Number | Mean | Rate


@dataclass
class Sums:
    """What a process has counted since the last log entry, by name.

    Attributes:
        totals, counts: of means.
        work: of rates of the whole run.
        work_per_device: of rates per device.
        memory: bytes in use at most.
    """

    totals: dict[str, Number] = field(default_factory=dict)
    counts: dict[str, Number] = field(default_factory=dict)
    work: dict[str, Number] = field(default_factory=dict)
    work_per_device: dict[str, Number] = field(default_factory=dict)
    memory: int = 0

    def add(self, name: str, value: "Value", weight: int) -> None:
        """Take in one value of a metric."""
        if isinstance(value, Rate):
            _count(self.work_per_device if value.per_device else self.work, name, value.amount)
            return
        mean = value if isinstance(value, Mean) else Mean(_plain(value) * weight, weight)
        _count(self.totals, name, mean.total)
        _count(self.counts, name, mean.count)

    def read(self) -> "Sums":
        """The same in Python numbers, which a GPU is waited for."""
        return Sums(
            _floats(self.totals), _floats(self.counts), _floats(self.work), _floats(self.work_per_device), self.memory
        )

    @classmethod
    def together(cls, parts: Sequence["Sums"]) -> "Sums":
        """Those of several processes."""
        whole = cls(memory=max(part.memory for part in parts))
        for name in ("totals", "counts", "work", "work_per_device"):
            for part in parts:
                for key, value in getattr(part, name).items():
                    _count(getattr(whole, name), key, value)
        return whole


def _floats(sums: Mapping[str, Number]) -> dict[str, Number]:
    return {name: float(value) for name, value in sums.items()}


def _count(sums: dict[str, Number], name: str, value: Number) -> None:
    sums[name] = sums.get(name, 0.0) + _plain(value)


def _plain(value: Number) -> Number:
    """A Python number, except on a GPU: reading a value there would wait for it."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_cuda else float(value.detach())
    return value


class StageTimer:
    """Seconds by stage of a step, as metrics ``seconds/NAME``.

    Args:
        device: waited for at the end of each stage, which costs a little speed.
        enabled: otherwise nothing is timed and nothing waits.
        barrier: ranks wait for each other before each stage's time is taken.
    """

    def __init__(self, device: torch.device, enabled: bool, barrier: bool = False) -> None:
        self.device, self.enabled, self.barrier = device, enabled, barrier
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stage."""
        if not self.enabled:
            yield
            return
        self._wait()
        start = perf_counter()
        yield
        self._wait()
        self._seconds[f"seconds/{name}"] = self._seconds.get(f"seconds/{name}", 0.0) + perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.barrier and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def take(self) -> dict[str, float]:
        """Times since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


class MetricLog:
    """Averages of the metrics between log lines, to the trackers, the log and a progress bar with rate and time left.

    All processes of a run make one and log at the same steps: then they tell each other what they counted. Names with a
    slash (``loss_time/0.25-0.5``) go to the trackers only.

    Args:
        folder: experiment folder; TensorBoard files go to ``tensorboard`` in it.
        total_steps: optimizer steps of the whole run.
        start_step: where the run resumes.
        log_every: optimizer steps between log entries.
        trackers: where curves go; None is TensorBoard alone.
        peak_flops: what the device could do per second; with a :class:`Rate` named ``tflops``, ``mfu`` is the share
            of it that is used.
        device: its memory is shown (peak since the start, of the process on a CPU).
        parallel: the processes of the run; the first one shows a progress bar.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        log_every: int = 1,
        *,
        trackers: Sequence[Tracker] | None = None,
        peak_flops: float | None = None,
        device: torch.device | None = None,
        parallel: ParallelContext | None = None,
    ) -> None:
        self.parallel = parallel or ParallelContext()
        self.trackers = list(trackers) if trackers is not None else [TensorBoardTracker(TrackedRun(folder, start_step))]
        self.bar = Bar(
            total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=2.0,
            disable=self.parallel.rank > 0, lines=False,
        )  # fmt: skip
        self.total_steps, self.log_every = total_steps, max(log_every, 1)
        self.peak_flops, self.device = peak_flops, device
        self._sums = Sums()
        self._since, self._steps = perf_counter(), 0

    def add(self, metrics: Mapping[str, Value], weight: int = 1) -> None:
        """Take in the metrics of one micro-batch or step."""
        for name, value in metrics.items():
            self._sums.add(name, value, weight)

    def step_done(self, step: int, lr: float) -> None:
        """One optimizer step (now ``step`` in all) is complete."""
        self._steps += 1
        self.bar.update(1)
        if step % self.log_every and step != self.total_steps:
            return
        values = self._collect(lr)
        for tracker in self.trackers:
            tracker.scalars(values, step)
        self._show(values, step)
        self._sums = Sums()
        self._since, self._steps = perf_counter(), 0

    def _collect(self, lr: float) -> dict[str, float]:
        """Everything since the last log entry, by name."""
        elapsed = perf_counter() - self._since
        self._sums.memory = peak_memory(self.device)
        sums = Sums.together(gather_values(self._sums.read(), self.parallel.dp))
        values = {name: float(total / sums.counts[name]) for name, total in sums.totals.items() if sums.counts[name]}
        values |= {"lr": lr, "seconds_per_step": elapsed / self._steps}
        if "data_seconds" in sums.totals:
            values["data_wait"] = float(sums.totals["data_seconds"]) / elapsed / self.parallel.dp.size
        values |= {f"{name}_per_s": float(amount) / elapsed for name, amount in sums.work.items()}
        for name, amount in sums.work_per_device.items():
            values[f"{name}_per_s"] = float(amount) / elapsed / self.parallel.world_size
        if self.peak_flops and "tflops_per_s" in values:
            values["mfu"] = values["tflops_per_s"] * 1e12 / self.peak_flops
        values["memory_gib"] = sums.memory / GIB
        return values

    def _show(self, values: dict[str, float], step: int) -> None:
        hidden = ("lr", "seconds_per_step", "data_seconds")
        shown = " ".join(f"{k}={v:.4g}" for k, v in values.items() if "/" not in k and k not in hidden)
        brief = {k: values[k] for k in ("loss", "grad_norm", "data_wait") if k in values}
        self.bar.set_postfix_str(" ".join(f"{k}={v:.3g}" for k, v in brief.items()), refresh=False)
        seconds = values["seconds_per_step"]
        left = duration(seconds * (self.total_steps - step))
        logger.info(
            "step %d/%d %s lr=%.3g %.2f s/step, %s left",
            step,
            self.total_steps,
            shown,
            values["lr"],
            seconds,
            left,
        )

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of this moment, such as a validation loss, to trackers and log at once."""
        for tracker in self.trackers:
            tracker.scalars(values, step)
        logger.info("step %d %s", step, " ".join(f"{k}={v:.4g}" for k, v in values.items()))

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        """A sample that was written to ``path``, to the trackers."""
        for tracker in self.trackers:
            tracker.video(name, frames, path, fps, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within it does not count as training (validation, sampling)."""
        start = perf_counter()
        yield
        self._since += perf_counter() - start

    def close(self) -> None:
        """Write what trackers hold back, and end the bar."""
        for tracker in self.trackers:
            tracker.close()
        self.bar.close()


def peak_memory(device: torch.device | None) -> int:
    """Bytes in use at most since the start: allocated on a GPU, resident in this process otherwise."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
