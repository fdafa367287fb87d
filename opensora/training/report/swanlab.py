"""Curves at SwanLab."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensora.training.report.trackers import TrackedRun, Tracker, filmstrip
from opensora.utils.errors import UserError
from opensora.utils.optional import require

ID_LETTERS = 21  # which the ids of runs have there


class SwanLabTracker(Tracker):
    """An experiment at SwanLab, or in a local folder with ``SWANLAB_MODE=local`` or ``offline``.

    Args:
        run: the name of its folder makes the experiment's id, so a resumed run continues the same curves.

    Raises:
        UserError: the package is not installed, or refuses to start.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._swanlab = _package()
        logs = run.folder / "swanlab"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._swanlab.init(
                project=run.project, experiment_name=run.title, config=dict(run.values), logdir=str(logs),
                id=hashlib.sha256(run.folder.name.encode()).hexdigest()[:ID_LETTERS], resume="allow",
            )  # fmt: skip
        except Exception as error:  # its own kinds are not exported
            raise UserError(f"trackers=swanlab: {error}; run `swanlab login`, or set SWANLAB_MODE=offline") from error

    @classmethod
    def check(cls) -> None:
        _package()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._swanlab.Text(text)}, step=step)

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        """As a GIF beside the file, which all versions of SwanLab take."""
        if len(frames) == 1:
            shown = self._swanlab.Image(filmstrip(frames))
        else:
            first, *rest = (Image.fromarray(frame) for frame in frames)
            moving = path.with_suffix(".gif")
            first.save(moving, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
            shown = self._swanlab.Video(str(moving))
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._swanlab.finish()


def _package() -> Any:
    return require("swanlab", "trackers=swanlab", "`pip install swanlab`")
