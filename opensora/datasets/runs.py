"""Runs of frames of a clip that are encoded on their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class ClipPart(Protocol):
    """What of a clip is encoded on its own, and kept under a name of its own."""

    @property
    def name(self) -> str:
        """What caches and batches call it."""

    def pieces(self, row: int, clip: Tensor) -> list[Tensor]:
        """The clips ``[3, T', H, W]`` that it is made of; as many, and as long, for every clip of a length.

        Args:
            row: of the table of clips.
            clip: ``[3, T, H, W]``, whole.
        """


@dataclass(frozen=True, order=True)
class FrameRun:
    """Consecutive frames of a clip, or of its latent.

    Attributes:
        at: ``head``, the first ones, ``tail``, the last ones, or the number of the first of them, from 0.
        frames: how many; of pixels or of latents, as the clip is.
    """

    at: Literal["head", "tail"] | int
    frames: int

    @property
    def name(self) -> str:
        """``head_1``, ``tail_33``, ...: what caches and batches call it."""
        return f"{self.at}_{self.frames}"

    def place(self, total: int) -> slice:
        """Where the run lies among ``total`` frames."""
        if self.at == "tail":
            return slice(total - self.frames, total)
        first = 0 if self.at == "head" else self.at
        return slice(first, first + self.frames)

    def cut(self, x: Tensor) -> Tensor:
        """Its frames of ``x [..., C, T, H, W]``."""
        return x[..., self.place(x.shape[-3]), :, :]

    def pieces(self, row: int, clip: Tensor) -> list[Tensor]:
        """The run, whatever the row; see :class:`ClipPart`."""
        return [self.cut(clip)]


def encode_part(
    part: ClipPart, rows: Sequence[int], clips: Sequence[Tensor], encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """What is stored of a part of clips, ``[B, C, t, h, w]``: of its pieces one after another.

    Args:
        part: which.
        rows: of the table, one per clip.
        clips: ``[3, T, H, W]`` of one size.
        encode: from clips ``[B, 3, T', H, W]`` to what is stored of them.
    """
    pieces = [part.pieces(row, clip) for row, clip in zip(rows, clips)]
    return torch.cat([encode(torch.stack(each)) for each in zip(*pieces)], dim=2)
