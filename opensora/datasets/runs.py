"""Runs of frames at either end of a clip."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, order=True)
class FrameRun:
    """The first (``head``) or the last (``tail``) frames of a clip, or of its latent.

    Attributes:
        at: end of the clip.
        frames: how many; of pixels or of latents, as the clip is.
    """

    at: Literal["head", "tail"]
    frames: int

    @property
    def name(self) -> str:
        """``head_1``, ``tail_33``, ...: what caches and batches call it."""
        return f"{self.at}_{self.frames}"

    def place(self, total: int) -> slice:
        """Where the run lies among ``total`` frames."""
        return slice(0, self.frames) if self.at == "head" else slice(total - self.frames, total)

    def cut(self, x: Tensor) -> Tensor:
        """Its frames of ``x [..., C, T, H, W]``."""
        return x[..., self.place(x.shape[-3]), :, :]
