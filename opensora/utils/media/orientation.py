"""How a stored frame or picture is turned and mirrored before it is shown."""

from dataclasses import dataclass
from typing import cast

import av
import numpy as np
from av.buffer import Buffer
from numpy.typing import NDArray

NONE_LEAST = 1 << 8  # entries of a display matrix (16.16 fixed point) below this are zero


@dataclass(frozen=True)
class Orientation:
    """Turns by right angles and mirrorings: first rows and columns change places, then either is reversed."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A view of ``[H, W]`` or ``[H, W, C]`` as it is shown."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        if self.flip_rows:
            pixels = pixels[::-1]
        return pixels[:, ::-1] if self.flip_columns else pixels

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown."""
        return (width, height) if self.transpose else (height, width)


def orientation_of(frame: "av.VideoFrame") -> Orientation:
    """What the display matrix of a decoded frame asks for, to the nearest right angle."""
    matrix = _display_matrix(frame)
    if matrix is None:
        quarter = round(float(frame.rotation or 0) / 90) % 4  # counter-clockwise
        return Orientation(quarter % 2 == 1, quarter in (1, 2), quarter in (2, 3))
    # x' = a x + c y, y' = b x + d y, both downwards and to the right
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if max(map(abs, (a, b, c, d))) < NONE_LEAST:
        return Orientation()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, b < 0, c < 0)
    return Orientation(False, d < 0, a < 0)


def _display_matrix(frame: "av.VideoFrame") -> NDArray[np.int32] | None:
    try:
        data = cast("Buffer | None", frame.side_data.get("DISPLAYMATRIX"))
    except ValueError:  # beside it something that PyAV has no name for
        return None
    return None if data is None else np.frombuffer(memoryview(data), np.int32)
