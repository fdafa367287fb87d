"""Tiles that fit into the memory that there is: those of the config if they do, otherwise the least different ones."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from opensora.models.autoencoder import Autoencoder
from opensora.models.vae.tiling import Tiling

SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4)  # of the configured sizes
LEAST_LATENTS = 4  # of the side of a tile, so that a quarter of it overlaps
MARGIN = 1.05  # of what is counted, for what is not
UNSURE = 1.2  # counted, when this much above the room by its volume; the rest cannot fit

Count = Callable[[Tiling], int | None]


@dataclass(frozen=True)
class Fit:
    """Tiles and what they take.

    Attributes:
        tiling: the tiles.
        bytes: of memory at the peak, None if it cannot be told.
        changed: whether they are not those of the config.
        fits: False where that is known to be too much.
    """

    tiling: Tiling
    bytes: int | None
    changed: bool
    fits: bool


def fit_tiling(tiling: Tiling, size: Sequence[int], room: int, count: Count) -> Fit:
    """The first of these that fits into ``room`` bytes: ``tiling`` itself, then `smaller` ones. If none does, the one
    that takes least.

    Args:
        tiling: that of the config.
        size: (t, h, w) of the latent.
        room: bytes.
        count: bytes that a tiling takes, None if it cannot tell.
    """
    found = count(tiling)
    if found is None or found * MARGIN <= room:
        return Fit(tiling, found, changed=False, fits=True)
    others = smaller(tiling, size)
    per_latent = found / tiling.volume(size)
    for other in others:
        if other.volume(size) * per_latent > room * UNSURE:
            continue
        taken = count(other)
        if taken is not None and taken * MARGIN <= room:
            return Fit(other, taken, changed=True, fits=True)
    least = min(others, key=lambda other: other.volume(size), default=tiling)
    return Fit(least, count(least), changed=least is not tiling, fits=False)


def smaller(tiling: Tiling, size: Sequence[int]) -> list[Tiling]:
    """Tilings of a latent (t, h, w) whose largest tile is smaller, by the work they double, least first; sides below
    half of the configured ones, at whose borders a network lacks the most, come last."""
    volume = tiling.volume(size)

    def rank(other: Tiling) -> tuple[int, float, int]:
        short = max(tiling.spatial_tile // 2 - other.spatial_tile, 0) if other.use_spatial else 0
        return short, other.work(size), -other.volume(size)

    found = [other for other in _others(tiling) if other.volume(size) < volume and _whole(other, size)]
    return sorted(found, key=rank)


def _others(tiling: Tiling) -> Iterator[Tiling]:
    ratio, *sides = tiling.compression
    side = math.lcm(*sides)
    spatial = _sizes(tiling.spatial_tile, side, LEAST_LATENTS * side)
    temporal = _sizes(tiling.temporal_tile, ratio, 2 * ratio)
    for pixels in spatial if tiling.use_spatial else [None, *spatial]:
        for frames in temporal if tiling.use_temporal else [None, *temporal]:
            yield replace(
                tiling,
                use_spatial=pixels is not None,
                use_temporal=frames is not None,
                spatial_tile=pixels or tiling.spatial_tile,
                temporal_tile=frames or tiling.temporal_tile,
            )


def _sizes(configured: int, multiple: int, least: int) -> list[int]:
    """The configured size and shares of it that are multiples of the compression."""
    whole = [max(int(configured * share) // multiple, 1) * multiple for share in SHARES]
    return [size for size in dict.fromkeys(whole) if size >= least] or whole[:1]


def _whole(tiling: Tiling, size: Sequence[int]) -> bool:
    """Whether no tile of time is left with a single latent, which without a causal lead decodes to a single frame."""
    if tiling.is_causal or not tiling.cuts_time(size[0]):
        return True
    last = tiling.latent_starts(size[0])[-1]
    return size[0] - last > 1


def fitting_clips(ae: Autoencoder, size: Sequence[int], dtype: torch.dtype, room: int) -> int | None:
    """How many clips (T, H, W) an autoencoder may encode at once within ``room`` bytes, one at least; None if it cannot
    be told what one takes."""
    cost = ae.encode_cost(size, dtype)
    return None if cost is None else max(int(room / (MARGIN * cost.peak)), 1)
