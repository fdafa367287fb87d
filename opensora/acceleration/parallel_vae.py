"""Video autoencoders whose tiles are divided over ranks."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.models.autoencoder import Autoencoder
from opensora.models.vae.tiling import Network
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
WELL, SHORT, STOPPED = "well", "out of memory", "stopped"  # what ranks tell each other of themselves


def share_tiles(ae: Autoencoder, axis: Axis) -> None:
    """Make an autoencoder divide its tiles over ranks when it encodes and decodes, in place.

    Every rank calls it with the same whole input and gets the whole output, bit for bit that of one process with the
    same tiles. What is not tiled is computed on every rank. For sampling only: gradients do not pass.

    Args:
        ae: one that cannot work in tiles stays as it is.
        axis: the ranks; nothing happens if there is only one.
    """
    if axis.group is None or ae.tiling is None:
        return
    if not (ae.tiling.use_spatial or ae.tiling.use_temporal):
        logger.info("the autoencoder works in one piece; --ae.use_spatial_tiling True divides it over the ranks")
    ae.tiling = dataclasses.replace(ae.tiling, runner=TileRunner(axis))


class SharedOutOfMemoryError(torch.OutOfMemoryError):
    """There was not enough memory on one of the ranks that share tiles; all of them raise it."""


class OtherRankStoppedError(RuntimeError):
    """A rank whose tiles are needed has failed, for a reason that it says itself."""


class TileRunner:
    """Runs every rank's share of the tiles there, and exchanges the results.

    Before they exchange tiles, ranks tell each other how they fare: one that is out of memory leaves none waiting, and
    all go on together, with smaller tiles or with an error.

    Args:
        axis: the ranks.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, tiles: list[Tensor], network: Network) -> list[Tensor]:
        """See `opensora.models.vae.tiling.Runner`. Tiles of all ranks must be the same.

        Raises:
            SharedOutOfMemoryError: on all ranks, if there was one that had not enough memory.
        """
        if len(tiles) == 1:
            return [network(tiles[0])]
        owners = self.owners(tiles)
        own = [i for i, owner in enumerate(owners) if owner == self.axis.rank]
        mine = _if_memory_allows(lambda: {i: network(tiles[i]).contiguous() for i in own})
        shapes: dict[int, torch.Size] = {}
        for status, found in self._hear(mine is not None, {i: x.shape for i, x in (mine or {}).items()}):
            if status == STOPPED:
                raise OtherRankStoppedError("a rank that shares tiles has stopped")
            shapes |= found
        done = mine or {}
        # the tile that was computed is the one that is sent: no rank holds a second copy of it
        outputs = _if_memory_allows(
            lambda: [done[i] if i in done else tile.new_empty(shapes[i]) for i, tile in enumerate(tiles)]
        )
        self._hear(outputs is not None)
        return [collectives.broadcast(out, self.axis, owner) for out, owner in zip(outputs or [], owners)]

    def _hear(self, enough: bool, value: Any = None) -> list[tuple[str, Any]]:
        return self._tell(WELL if enough else SHORT, value)

    def _tell(self, status: str, value: Any = None) -> list[tuple[str, Any]]:
        """How all ranks fare, and what each has to say."""
        everyone = collectives.gather_values((status, value), self.axis)
        short = [rank for rank, (of_rank, _) in enumerate(everyone) if of_rank == SHORT]
        if short:
            raise SharedOutOfMemoryError(f"rank {short[0]} of {self.axis.size} that share tiles is out of memory")
        return everyone

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, what one rank has too little memory for is too much for all of them.

        Raises:
            SharedOutOfMemoryError: on all ranks, if there was one that had not enough memory.
        """
        enough = True
        try:
            yield
        except (SharedOutOfMemoryError, OtherRankStoppedError):  # which all know of
            raise
        except torch.OutOfMemoryError:
            enough = False
        except Exception:
            self._tell(STOPPED)
            raise
        self._hear(enough)

    def owners(self, tiles: list[Tensor]) -> list[int]:
        """Rank that runs each tile: the largest are given out first, each to the rank with the least to do."""
        load, owners = [0] * self.axis.size, [0] * len(tiles)
        for i in sorted(range(len(tiles)), key=lambda i: -tiles[i].numel()):
            owners[i] = load.index(min(load))
            load[owners[i]] += tiles[i].numel()
        return owners


def _if_memory_allows(make: Callable[[], T]) -> T | None:
    """What a function makes; None if there is not enough memory, of which nothing is held then."""
    try:
        return make()
    except torch.OutOfMemoryError:
        return None


def together(ae: Autoencoder) -> AbstractContextManager[None]:
    """What an autoencoder does on all ranks that share its tiles, see `TileRunner.together`; others do it alone."""
    runner = None if ae.tiling is None else ae.tiling.runner
    return runner.together() if isinstance(runner, TileRunner) else nullcontext()
