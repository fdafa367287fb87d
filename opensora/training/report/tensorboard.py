"""Curves in TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opensora.training.report.trackers import TrackedRun, Tracker, filmstrip
from opensora.utils.optional import require


class TensorBoardTracker(Tracker):
    """TensorBoard files in ``<folder>/tensorboard``; videos are shown as filmstrips.

    Args:
        run: what an earlier, killed one wrote beyond its start (one that left no checkpoint: all of it) is hidden.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start_step + 1)

    @classmethod
    def check(cls) -> None:
        require("tensorboard", "trackers=tensorboard", "`pip install tensorboard`")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        lines = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown leaves these as they are
        self.writer.add_text(name, lines, step)

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        self.writer.add_image(name, filmstrip(frames), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
