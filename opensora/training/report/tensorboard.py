"""Curves in TensorBoard."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from opensora.training.report.trackers import TrackedRun, Tracker, filmstrip
from opensora.utils.files import nameless_error
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

        self.folder = run.folder / "tensorboard"
        with self._named():
            self.writer = SummaryWriter(str(self.folder), purge_step=run.start_step + 1)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of a disk that takes nothing more come from the library's thread, and name no file."""
        try:
            yield
        except OSError as error:
            number = nameless_error(error)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(self.folder)) from error

    @classmethod
    def check(cls) -> None:
        require("tensorboard", "trackers=tensorboard", "`pip install tensorboard`")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with self._named():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        lines = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown leaves these as they are
        with self._named():
            self.writer.add_text(name, lines, step)

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        with self._named():
            self.writer.add_image(name, filmstrip(frames), step, dataformats="HWC")

    def close(self) -> None:
        with self._named():
            self.writer.close()
