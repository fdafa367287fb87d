"""Where metrics, sample videos and texts go besides the log: what a tracker is, and which ones a config asks for."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opensora.config import config_to_text
from opensora.config.choices import TRACKERS
from opensora.config.commands import LoopOptions
from opensora.utils.errors import UserError


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts.

    Attributes:
        folder: experiment folder; its name says which run goes on.
        start_step: optimizer step where the run goes on; what a killed run logged beyond it is to be hidden.
        project: name of the project, for trackers that have some.
        name: of the run; the folder's, if not given.
        values: the resolved config, as plain values.
    """

    folder: Path
    start_step: int = 0
    project: str = "Open-Sora"
    name: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What to call the run."""
        return self.name or self.folder.name


class Tracker(Protocol):
    """A place that shows curves, texts and videos. The first process of a run makes one, of a :class:`TrackedRun`, and
    calls it at the end of an optimizer step."""

    @classmethod
    def check(cls) -> None:
        """Find what is missing before any model is loaded, such as a package or an account.

        Raises:
            UserError: says what to do.
        """

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one optimizer step."""

    def text(self, name: str, text: str, step: int) -> None:
        """Lines to read, such as the config; nothing where there is no place for them."""

    def video(self, name: str, frames: np.ndarray, path: Path, fps: float, step: int) -> None:
        """A sample: uint8 ``[T, H, W, 3]``, also in the file ``path``; nothing where there is no place for it."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still held back."""


def filmstrip(frames: np.ndarray, count: int = 6) -> np.ndarray:
    """Up to ``count`` evenly spaced frames of uint8 ``[T, H, W, 3]`` side by side: ``[H, n W, 3]``."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)


def tracker_names(cfg: LoopOptions) -> list[str]:
    """Trackers of a config in their order; ``wandb=True`` adds that one."""
    return list(dict.fromkeys([*cfg.trackers, *(["wandb"] if cfg.wandb else [])]))


def check_trackers(cfg: LoopOptions) -> None:
    """See that what the config asks for is installed and will not ask for a password later.

    Raises:
        UserError: it is not, or it will.
    """
    for name in tracker_names(cfg):
        tracker = TRACKERS.get(name)
        if not isinstance(tracker, type) or not hasattr(tracker, "scalars"):
            raise UserError(f"trackers: {name} is {tracker!r}, no class derived from Tracker")
        tracker.check()  # type: ignore[attr-defined]


def create_trackers(cfg: LoopOptions, folder: Path, start_step: int) -> Sequence[Tracker]:
    """Trackers of a training config, with its text and the prompts of its samples in each."""
    name = getattr(cfg, "wandb_expr_name", None)
    run = TrackedRun(folder, start_step, cfg.wandb_project, name, cfg.to_dict())
    trackers: list[Tracker] = [TRACKERS.get(name)(run) for name in tracker_names(cfg)]
    samples = getattr(cfg, "samples", None)
    texts = {"config": config_to_text(cfg), **({"prompts": "\n".join(samples.prompts)} if samples else {})}
    for tracker in trackers:
        for title, text in texts.items():
            tracker.text(title, text, start_step)
    return trackers
