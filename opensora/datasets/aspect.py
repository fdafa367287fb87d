"""Resolution names, aspect ratios, and the frame sizes they stand for.

A resolution is an amount of pixels: ``256px`` means 256 x 256 of them, ``360p`` those of a 640 x 360 picture (16:9). An
aspect ratio is ``width:height``. Sizes are always ``(height, width)`` and multiples of what the models need, given as
an argument (16 for autoencoder x8 and patch 2, 32 for the high-compression autoencoder).
"""

import math
import re
from collections.abc import Iterable

from opensora.utils.errors import UserError

Size = tuple[int, int]

BASE_RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")


def num_pixels(resolution: str) -> int:
    """Pixels of a resolution name, ``<N>px`` (N x N) or ``<N>p`` (N rows at 16:9).

    Raises:
        UserError: not such a name.
    """
    match = re.fullmatch(r"(\d+)(px|p)", resolution)
    if match is None or int(match[1]) == 0:
        raise UserError(
            f"unknown resolution {resolution!r}; valid: <N>px such as 256px, 512px, 768px, 1024px, "
            "or <N>p such as 144p, 240p, 360p, 480p, 720p, 1080p"
        )
    side = int(match[1])
    return side**2 if match[2] == "px" else int(side**2 / 9 * 16)


def _mirrored(ratio: str) -> str:
    width, height = ratio.split(":")
    return f"{height}:{width}"


def _size(pixels: int, ratio: str, multiple: int) -> Size:
    """Largest multiples within ``pixels`` at about this ratio, width first."""
    width, height = map(float, ratio.split(":"))
    columns = int(math.sqrt(pixels * width / height) / multiple) * multiple
    rows = int(pixels / columns / multiple) * multiple if columns else 0
    return rows, columns


def _nearer_size(pixels: int, size: Size, multiple: int) -> Size:
    """The size, or the one a single step of height or width away, whose area is nearest to ``pixels``."""
    rows, columns = size
    steps = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
    candidates = [(rows + dy * multiple, columns + dx * multiple) for dy, dx in steps]
    return min(candidates, key=lambda candidate: abs(candidate[0] * candidate[1] - pixels))


def aspect_ratio_table(pixels: int, multiple: int = 16, training: bool = False) -> dict[str, Size]:
    """Sizes by aspect-ratio name.

    Args:
        pixels: target area.
        multiple: heights and widths divide by it.
        training: sizes may exceed the area by a step when that comes nearer to it, and of several names for the same
            size only the first stays (each size is one bucket). Otherwise all 15 names are listed.

    Returns:
        ``{"16:9": (height, width), ...}``. A mirrored ratio has the mirrored size, and where both a ratio and its
        mirror are base ratios, each takes the mirror of the other's computed size.
    """
    direct = {ratio: _size(pixels, ratio, multiple) for ratio in BASE_RATIOS}
    if training:
        direct = {ratio: _nearer_size(pixels, size, multiple) for ratio, size in direct.items()}
    table = dict(direct)
    table.update({_mirrored(ratio): (columns, rows) for ratio, (rows, columns) in direct.items()})
    table = {ratio: size for ratio, size in table.items() if min(size) > 0}
    if not training:
        return table
    first_names = {size: ratio for ratio, size in reversed(table.items())}
    return {ratio: size for ratio, size in table.items() if first_names[size] == ratio}


def resolution_table(resolution: str, multiple: int = 16, training: bool = True) -> tuple[int, dict[str, Size]]:
    """Area and sizes behind a bucket's resolution name.

    Args:
        resolution: ``256px`` for all ratios, ``256px_ar16:9`` for one, ``256px_max`` for the largest.
        multiple: see :func:`aspect_ratio_table`.
        training: see :func:`aspect_ratio_table`.

    Raises:
        UserError: unknown name or ratio.
    """
    name, _, setting = resolution.partition("_")
    pixels = num_pixels(name)
    table = aspect_ratio_table(pixels, multiple, training)
    if not setting:
        return pixels, table
    if setting == "max":
        ratio = max(table, key=lambda key: table[key][0] * table[key][1])
        return pixels, {ratio: table[ratio]}
    if setting.startswith("ar"):
        return pixels, {setting[2:]: get_image_size(name, setting[2:], multiple, training)}
    raise UserError(f"unknown resolution {resolution!r}; after '_' there may be 'ar<width>:<height>' or 'max'")


def get_image_size(resolution: str, aspect_ratio: str, multiple: int = 16, training: bool = False) -> Size:
    """Size of a frame.

    Args:
        resolution: such as ``256px`` or ``720p``.
        aspect_ratio: ``width:height``, one of the 15 names.
        multiple: height and width divide by it.
        training: see :func:`aspect_ratio_table`; names that share a size may all be asked for.

    Returns:
        (height, width).

    Raises:
        UserError: unknown resolution or ratio, or a resolution too small for the ratio; lists what is valid.
    """
    pixels = num_pixels(resolution)
    table = aspect_ratio_table(pixels, multiple)
    if aspect_ratio not in table:
        raise UserError(
            f"unknown aspect_ratio {aspect_ratio!r} for resolution {resolution}; "
            f"valid (width:height): {', '.join(table) or 'none, the resolution is too small'}"
        )
    if not training:
        return table[aspect_ratio]
    if aspect_ratio in BASE_RATIOS and _mirrored(aspect_ratio) not in BASE_RATIOS:
        return _nearer_size(pixels, _size(pixels, aspect_ratio, multiple), multiple)
    rows, columns = _nearer_size(pixels, _size(pixels, _mirrored(aspect_ratio), multiple), multiple)
    return columns, rows


def closest_aspect_ratio(height: int, width: int, ratios: Iterable[str]) -> str:
    """Of ``width:height`` names, the one whose height / width is nearest to a frame's."""

    def distance(ratio: str) -> float:
        columns, rows = map(float, ratio.split(":"))
        return abs(height / width - rows / columns)

    return min(ratios, key=distance)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
