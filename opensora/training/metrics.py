"""What a run shows while it goes on: progress bar, log file, TensorBoard."""

from collections import defaultdict
from pathlib import Path
from time import perf_counter

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from opensora.utils.logging import get_logger

logger = get_logger(__name__)


class MetricLog:
    """Averages of the metrics between log lines, to TensorBoard, the log and a progress bar with rate and time left.

    Args:
        folder: experiment folder; TensorBoard files go to ``tensorboard`` in it.
        total_steps: optimizer steps of the whole run.
        start_step: where the run goes on.
        log_every: optimizer steps between log entries.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int = 0, log_every: int = 1) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=2.0)
        self.total_steps, self.log_every = total_steps, max(log_every, 1)
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._since, self._steps = perf_counter(), 0

    def add(self, metrics: dict[str, float], weight: int = 1) -> None:
        """Take in the metrics of one micro-batch or step."""
        for name, value in metrics.items():
            self._sums[name] += value * weight
            self._counts[name] += weight

    def step_done(self, step: int, lr: float) -> None:
        """One optimizer step (now ``step`` in all) is complete."""
        self._steps += 1
        self.bar.update(1)
        if step % self.log_every and step != self.total_steps:
            return
        seconds = (perf_counter() - self._since) / self._steps
        means = {name: self._sums[name] / self._counts[name] for name in self._sums}
        for name, value in {**means, "lr": lr, "seconds_per_step": seconds}.items():
            self.writer.add_scalar(name, value, step)
        shown = " ".join(f"{name}={value:.4g}" for name, value in means.items())
        self.bar.set_postfix_str(shown, refresh=False)
        left = seconds * (self.total_steps - step) / 60
        logger.info(
            "step %d/%d %s lr=%.3g %.2f s/step, %.1f min left", step, self.total_steps, shown, lr, seconds, left
        )
        self._sums.clear()
        self._counts.clear()
        self._since, self._steps = perf_counter(), 0

    def close(self) -> None:
        """Flush TensorBoard and the bar."""
        self.writer.close()
        self.bar.close()
