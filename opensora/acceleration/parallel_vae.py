"""Video autoencoders whose tiles are divided over ranks."""

import dataclasses

import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.models.autoencoder import Autoencoder
from opensora.models.vae.tiling import Network
from opensora.utils.logging import get_logger

logger = get_logger(__name__)


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


class TileRunner:
    """Runs every rank's share of the tiles there, and exchanges the results.

    Args:
        axis: the ranks.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, tiles: list[Tensor], network: Network) -> list[Tensor]:
        """See `opensora.models.vae.tiling.Runner`. Tiles of all ranks must be the same."""
        if len(tiles) == 1:
            return [network(tiles[0])]
        owners = self.owners(tiles)
        mine = {i: network(tile) for i, tile in enumerate(tiles) if owners[i] == self.axis.rank}
        shapes: dict[int, torch.Size] = {}
        for found in collectives.gather_values({i: x.shape for i, x in mine.items()}, self.axis):
            shapes |= found
        outputs = []
        for i, tile in enumerate(tiles):
            # the tile that was computed is the one that is sent: no rank holds a second copy of it
            out = mine.pop(i).contiguous() if i in mine else tile.new_empty(shapes[i])
            outputs.append(collectives.broadcast(out, self.axis, owners[i]))
        return outputs

    def owners(self, tiles: list[Tensor]) -> list[int]:
        """Rank that runs each tile: the largest are given out first, each to the rank with the least to do."""
        load, owners = [0] * self.axis.size, [0] * len(tiles)
        for i in sorted(range(len(tiles)), key=lambda i: -tiles[i].numel()):
            owners[i] = load.index(min(load))
            load[owners[i]] += tiles[i].numel()
        return owners
