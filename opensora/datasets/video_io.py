"""Clips and pictures of a dataset, whose errors are those of a row rather than of the run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opensora.utils.errors import UserError
from opensora.utils.media import frames
from opensora.utils.media.pictures import read_picture


class BrokenMediaError(RuntimeError):
    """A clip or picture of the dataset cannot be used; the message names file and reason."""


def read_frames(path: str | Path, indices: Sequence[int], fps: float | None = None) -> NDArray[np.uint8]:
    """Chosen frames of a clip, see :func:`opensora.utils.media.frames.read_frames`.

    Raises:
        BrokenMediaError: unreadable file, a damaged frame, or fewer frames than asked for.
    """
    try:
        return frames.read_frames(path, indices, fps)
    except UserError as error:
        raise BrokenMediaError(str(error)) from error


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """A picture, see :func:`opensora.utils.media.pictures.read_picture`.

    Raises:
        BrokenMediaError: missing or unreadable.
    """
    try:
        return read_picture(path)
    except UserError as error:
        raise BrokenMediaError(str(error)) from error
