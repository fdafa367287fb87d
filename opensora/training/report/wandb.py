"""Curves at Weights & Biases."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opensora.training.report.trackers import TrackedRun, Tracker
from opensora.utils.errors import UserError
from opensora.utils.optional import require


class WandbTracker(Tracker):
    """A run at Weights & Biases, or in a local folder with ``WANDB_MODE=offline``.

    Args:
        run: the name of its folder is the run's id (with ``-`` for what an id must not hold), so a resumed run goes on
            in the same curves.

    Raises:
        UserError: the package is not installed, or refuses to start.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._wandb = _package()
        run_id = re.sub(r"[^\w.-]", "-", run.folder.name)
        try:
            self._run = self._wandb.init(
                project=run.project, name=run.title, id=run_id, resume="allow", config=dict(run.values),
                dir=str(run.folder),
            )  # fmt: skip
        except self._wandb.Error as error:
            raise UserError(f"wandb=True: {error}") from error

    @classmethod
    def check(cls) -> None:
        package = _package()
        if package.setup().settings.mode == "online" and not package.login(prompt=False, verify=False):
            raise UserError("wandb=True: not logged in; run `wandb login`, or set WANDB_MODE=offline to keep it local")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        self._run.log({name: self._wandb.Video(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _package() -> Any:
    return require("wandb", "wandb=True", "`pip install wandb`")
