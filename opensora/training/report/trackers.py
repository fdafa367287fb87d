"""Where metrics and sample videos go besides the log: TensorBoard always, Weights & Biases on request."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from opensora.config.commands import LoopOptions
from opensora.utils.errors import UserError


class Tracker(Protocol):
    """A place that shows curves and videos."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one optimizer step."""

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        """A sample: uint8 ``[T, H, W, 3]``, also in the file ``path``."""

    def close(self) -> None:
        """Write what is still held back."""


def filmstrip(frames: np.ndarray, count: int = 6) -> np.ndarray:
    """Up to ``count`` evenly spaced frames of uint8 ``[T, H, W, 3]`` side by side: ``[H, n W, 3]``."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)


class TensorBoardTracker:
    """TensorBoard files in ``<folder>/tensorboard``; videos are shown as filmstrips.

    Args:
        folder: experiment folder.
        start_step: where the run goes on; what an earlier, killed run wrote beyond it (one that left no checkpoint:
            all of it) is hidden.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        self.writer.add_image(name, filmstrip(frames), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A run at Weights & Biases, or in a local folder with ``WANDB_MODE=offline``.

    Args:
        folder: experiment folder; its name is the run's id (with ``-`` for what an id must not hold), so a resumed run
            goes on in the same curves.
        project: project at Weights & Biases.
        values: the resolved config, as plain values.
        name: of the run; None takes the folder's.

    Raises:
        UserError: the package is not installed, or refuses to start.
    """

    def __init__(self, folder: Path, project: str, values: Mapping[str, Any], name: str | None = None) -> None:
        self._wandb = _import_wandb()
        run_id = re.sub(r"[^\w.-]", "-", folder.name)
        try:
            self._run = self._wandb.init(
                project=project, name=name or folder.name, id=run_id, resume="allow", config=dict(values),
                dir=str(folder),
            )  # fmt: skip
        except self._wandb.Error as error:
            raise UserError(f"wandb=True: {error}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        self._run.log({name: self._wandb.Video(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb=True needs the package wandb: pip install wandb") from error
    return wandb


def check_trackers(cfg: LoopOptions) -> None:
    """See that what the config asks for is installed and will not ask for a password later.

    Raises:
        UserError: it is not, or it will.
    """
    if not cfg.wandb:
        return
    wandb = _import_wandb()
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("wandb=True: not logged in; run `wandb login`, or set WANDB_MODE=offline to keep it local")


def create_trackers(cfg: LoopOptions, folder: Path, start_step: int) -> Sequence[Tracker]:
    """Trackers of a training config."""
    trackers: list[Tracker] = [TensorBoardTracker(folder, start_step)]
    if cfg.wandb:
        trackers.append(WandbTracker(folder, cfg.wandb_project, cfg.to_dict(), getattr(cfg, "wandb_expr_name", None)))
    return trackers
