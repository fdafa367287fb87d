"""Encoding and decoding of videos in overlapping tiles, shared by all video autoencoders.

A network that would not fit in memory on a whole video is run on tiles. Neighbouring tiles overlap; in the overlap the
earlier tile fades linearly into the later one. All sizes derive from whole latents, so the tiles of pixels and those of
latents always cover the same area, whatever tile size and overlap are configured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.utils.errors import UserError

Network = Callable[[Tensor], Tensor]
Runner = Callable[[list[Tensor], Network], list[Tensor]]
"""Runs a network on tiles, in whatever order or place; results in the order of the tiles."""
TIME, HEIGHT, WIDTH = 2, 3, 4  # axes of [B, C, T, H, W]


@dataclass(frozen=True)
class TileAxis:
    """How one axis is cut into tiles and put together again.

    Args:
        size: input elements of a tile; the last ones may be shorter.
        stride: input elements from the start of one tile to the next.
        extent: output elements over which a tile fades in from the one before.
        keep: output elements that a tile contributes; the rest is the part that the next tile fades in from.
        lead: 1 for causal time: a tile is given one element more, whose own output (a first frame, which a causal
            network treats differently) is dropped from every tile but the first.
    """

    size: int
    stride: int
    extent: int
    keep: int
    lead: int = 0

    def starts(self, length: int) -> range:
        """Where tiles start on an axis of ``length`` elements; a tile of nothing but the lead is left out."""
        return range(0, max(length - self.lead, 1), self.stride)

    def covered(self, length: int) -> int:
        """Elements of all tiles of an axis of ``length`` elements together."""
        return sum(min(self.size + self.lead, length - start) for start in self.starts(length))

    def cut(self, x: Tensor, start: int, dim: int) -> Tensor:
        """The tile of ``x`` that starts at ``start``, a view."""
        return x.narrow(dim, start, min(self.size + self.lead, x.shape[dim] - start))

    def join(self, before: Tensor | None, tile: Tensor, dim: int) -> Tensor:
        """``tile`` with its beginning faded in from the end of ``before`` (None for a first tile).

        Element k of the ``extent`` common ones becomes ``(1 - k / extent) before + k / extent tile``.
        """
        extent = 0 if before is None else min(before.shape[dim], tile.shape[dim], self.extent)
        if before is None or not extent:
            return tile
        shape = [1] * tile.ndim
        shape[dim] = extent
        exact = torch.promote_types(tile.dtype, torch.float32)
        weight = (torch.arange(extent, dtype=exact, device=tile.device) / extent).reshape(shape)
        end = before.narrow(dim, before.shape[dim] - extent, extent)
        mixed = (end * (1 - weight) + tile.narrow(dim, 0, extent) * weight).to(tile.dtype)
        return torch.cat([mixed, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)

    def end(self, tile: Tensor, dim: int) -> Tensor:
        """The part of a tile that the next one fades in from; a copy, so that the tile can be freed."""
        extent = min(self.extent, tile.shape[dim])
        return tile.narrow(dim, tile.shape[dim] - extent, extent).clone()

    def crop(self, tile: Tensor, dim: int, first: bool) -> Tensor:
        """What the tile contributes to the output, a view."""
        return tile.narrow(dim, 0, min(self.keep + self.lead * first, tile.shape[dim]))


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a video autoencoder, and encoding and decoding by them.

    Args:
        compression: pixels per latent along (time, height, width).
        is_causal: the first frame has a latent of its own (T = 4k + 1).
        spatial_tile: side of a tile, in pixels.
        temporal_tile: length of a tile, in frames.
        overlap: share of a tile that overlaps the next one, in [0, 1); rounded down to whole latents.
        use_spatial, use_temporal: whether frames larger, videos longer than a tile are tiled.
        runner: takes all tiles at once, to divide them over devices; None runs one after the other as they are needed.

    Raises:
        UserError: an overlap outside [0, 1), or a tile size in use that is not a multiple of the compression.
    """

    compression: tuple[int, int, int]
    is_causal: bool
    spatial_tile: int
    temporal_tile: int
    overlap: float
    use_spatial: bool = False
    use_temporal: bool = False
    runner: Runner | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise UserError(f"ae.tile_overlap_factor={self.overlap}: must be at least 0 and below 1")
        time, height, width = self.compression
        for used, kind, size, ratio in (
            (self.use_spatial, "spatial", self.spatial_tile, math.lcm(height, width)),
            (self.use_temporal, "temporal", self.temporal_tile, time),
        ):
            if used and (size < ratio or size % ratio):
                nearest = max(round(size / ratio), 1) * ratio
                raise UserError(f"ae: {kind} tiles of {size} must be a multiple of {ratio}; nearest: {nearest}")

    def encode(self, x: Tensor, network: Network) -> Tensor:
        """Run ``network`` (``[B, C, T, H, W]`` pixels to ``[B, C', t, h, w]``) on ``x``, in tiles where due."""
        return self._run(x, network, [self._axis(dim, decoding=False) for dim in (TIME, HEIGHT, WIDTH)])

    def decode(self, z: Tensor, network: Network) -> Tensor:
        """Run ``network`` (``[B, C, t, h, w]`` latents to ``[B, C', T, H, W]``) on ``z``, in tiles where due."""
        return self._run(z, network, [self._axis(dim, decoding=True) for dim in (TIME, HEIGHT, WIDTH)])

    def decode_parts(self, z: Tensor, network: Network) -> Iterator[Tensor]:
        """What `decode` gives, in consecutive parts along time, one for each tile of it: nothing of a part is still
        to be faded, and nothing of it is held once the next is asked for."""
        return self._parts(z, network, [self._axis(dim, decoding=True) for dim in (TIME, HEIGHT, WIDTH)])

    def cuts_time(self, latent_frames: int) -> bool:
        """Whether a latent of that length is decoded in several tiles of time."""
        return self.use_temporal and latent_frames > self.latent_tile(TIME)

    def latent_starts(self, latent_frames: int) -> range:
        """First latents of the tiles of time of a latent of that length."""
        return self._axis(TIME, decoding=True).starts(latent_frames)

    def largest(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Latent (t, h, w) of the largest tile of a latent of that size."""
        time, rows, columns = (self._axis(dim, decoding=True) for dim in (TIME, HEIGHT, WIDTH))
        t, h, w = size
        if self.cuts_time(t):
            t = min(t, time.size + time.lead)
        if self.use_spatial:
            h, w = min(h, rows.size), min(w, columns.size)
        return t, h, w

    def volume(self, size: Sequence[int]) -> int:
        """Latents of the largest tile."""
        return math.prod(self.largest(size))

    def work(self, size: Sequence[int]) -> float:
        """Latents that tiles of a latent (t, h, w) cover, over those that it has: 1 for one piece."""
        axes = [self._axis(dim, decoding=True) for dim in (TIME, HEIGHT, WIDTH)]
        in_space = self.use_spatial and (size[1] > axes[1].size or size[2] > axes[2].size)
        used = (self.cuts_time(size[0]), in_space, in_space)
        return math.prod(axis.covered(length) / length for axis, length, cut in zip(axes, size, used) if cut)

    def describe(self) -> str:
        """The tiles in words."""
        sizes = [f"{self.spatial_tile} px"] if self.use_spatial else []
        sizes += [f"{self.temporal_tile} frames"] if self.use_temporal else []
        return f"tiles of {' and '.join(sizes)}" if sizes else "one piece"

    def latent_tile(self, dim: int) -> int:
        """Latents of a tile along an axis (2 time, 3 height, 4 width)."""
        return (self.temporal_tile if dim == TIME else self.spatial_tile) // self.compression[dim - TIME]

    def _axis(self, dim: int, decoding: bool) -> TileAxis:
        ratio, size = self.compression[dim - TIME], self.latent_tile(dim)
        extent = int(size * self.overlap)
        keep = size - extent
        lead = int(self.is_causal and dim == TIME)
        if decoding:
            return TileAxis(size, keep, extent * ratio, keep * ratio, lead)
        return TileAxis(size * ratio, keep * ratio, extent, keep, lead)

    def _run(self, x: Tensor, network: Network, axes: list[TileAxis]) -> Tensor:
        parts = [*self._parts(x, network, axes)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, TIME)

    def _parts(self, x: Tensor, network: Network, axes: list[TileAxis]) -> Iterator[Tensor]:
        if self.runner is None:
            return self._join(x, network, axes)
        outputs = iter(self.runner(list(self._cut(x, axes)), network))
        return self._join(x, lambda tile: next(outputs), axes)

    def _cut(self, x: Tensor, axes: list[TileAxis]) -> Iterator[Tensor]:
        """The tiles of ``x``, in the order in which `_join` asks for them."""
        time, rows, columns = axes
        for start in time.starts(x.shape[TIME]) if self._in_tiles_of_time(x, time) else [None]:
            part = x if start is None else time.cut(x, start, TIME)
            if not self._in_tiles_of_space(part, rows, columns):
                yield part
                continue
            for top in rows.starts(x.shape[HEIGHT]):
                for left in columns.starts(x.shape[WIDTH]):
                    yield columns.cut(rows.cut(part, top, HEIGHT), left, WIDTH)

    def _in_tiles_of_time(self, x: Tensor, time: TileAxis) -> bool:
        return self.use_temporal and x.shape[TIME] > time.size

    def _in_tiles_of_space(self, x: Tensor, rows: TileAxis, columns: TileAxis) -> bool:
        return self.use_spatial and (x.shape[HEIGHT] > rows.size or x.shape[WIDTH] > columns.size)

    def _join(self, x: Tensor, network: Network, axes: list[TileAxis]) -> Iterator[Tensor]:
        time, rows, columns = axes

        def frames(part: Tensor) -> Tensor:
            tiled = self._in_tiles_of_space(part, rows, columns)
            return _in_space(part, network, rows, columns) if tiled else network(part)

        return _in_time(x, frames, time) if self._in_tiles_of_time(x, time) else (frames(part) for part in (x,))


def _in_time(x: Tensor, network: Network, axis: TileAxis) -> Iterator[Tensor]:
    before = None
    for start in axis.starts(x.shape[TIME]):
        first = start == 0
        tile = network(axis.cut(x, start, TIME))
        if axis.lead and not first:
            tile = tile[:, :, axis.lead :]
        tile = axis.join(before, tile, TIME)
        before = axis.end(tile, TIME)
        tile = axis.crop(tile, TIME, first)
        yield tile
        del tile  # not held while the next one is made


def _in_space(x: Tensor, network: Network, rows: TileAxis, columns: TileAxis) -> Tensor:
    """Tiles in raster order, each faded in from the finished tile above it, then from the finished one to its left."""

    def strip(top: int, above: Iterator[Tensor | None], below: list[Tensor | None]) -> Tensor:
        parts: list[Tensor] = []
        left = None
        for start in columns.starts(x.shape[WIDTH]):
            tile = network(columns.cut(rows.cut(x, top, HEIGHT), start, WIDTH))
            tile = columns.join(left, rows.join(next(above), tile, HEIGHT), WIDTH)
            left = columns.end(tile, WIDTH)
            below.append(rows.end(tile, HEIGHT))
            parts.append(columns.crop(rows.crop(tile, HEIGHT, top == 0), WIDTH, start == 0))
        return torch.cat(parts, WIDTH)

    strips: list[Tensor] = []
    ends: list[Tensor | None] = [None] * len(columns.starts(x.shape[WIDTH]))
    for top in rows.starts(x.shape[HEIGHT]):
        below: list[Tensor | None] = []
        strips.append(strip(top, iter(ends), below))
        ends = below
    return torch.cat(strips, HEIGHT)
