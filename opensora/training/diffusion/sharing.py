"""Clips and texts through the frozen encoders of a training run: as many clips at once as memory allows, and each only
once where several ranks work on the same samples."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.acceleration.parallel_vae import TileRunner, together
from opensora.models.autoencoder import Autoencoder
from opensora.models.vae.fitting import fitting_clips
from opensora.utils.logging import get_logger
from opensora.utils.sizes import parse_bytes

logger = get_logger(__name__)

ENCODED_AT_ONCE = 8  # clips, on a CPU
ENCODE_MEMORY = "8GB"  # of a GPU


def encode_room(given: str | None, device: torch.device) -> int | None:
    """Bytes that encoding may take, from the key ``encode_memory``; None for a number of clips, whatever they take."""
    if given is None and device.type == "cpu":
        return None
    return parse_bytes(given or ENCODE_MEMORY, "encode_memory")


class ClipEncoder:
    """An autoencoder's first step, from clips to what is stored of them.

    As many clips go through it at once as fit into its memory; results are those of clips encoded one by one, up to
    what the size of a batch does to the last bits. Ranks that work on the same samples divide the clips of a batch
    among them, or, where there are fewer clips than ranks, the tiles of each, and exchange what comes out.

    Args:
        ae: the autoencoder.
        axis: ranks that call this with the same clips.
        room: bytes that encoding may take beyond weights and clips; None: ``most`` clips, whatever they take.
        most: clips at once where there is no ``room``.
    """

    def __init__(
        self, ae: Autoencoder, axis: Axis | None = None, room: int | None = None, most: int = ENCODED_AT_ONCE
    ) -> None:
        self.ae, self.axis, self.room, self.most = ae, axis or Axis(), room, most
        self._known: dict[tuple[torch.Size, torch.dtype], int] = {}

    def at_once(self, size: Sequence[int], dtype: torch.dtype) -> int:
        """How many clips (T, H, W) go through the network together, on one rank."""
        key = (torch.Size(size), dtype)
        if key not in self._known:
            found = None if self.room is None else fitting_clips(self.ae, size, dtype, self.room)
            self._known[key] = self.most if found is None else found
        return self._known[key]

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """What is to be stored of clips [B, 3, T, H, W]: [B, 2C, t, h, w], or latents without a posterior."""
        count, ranks = len(clips), self.axis.size
        if ranks == 1:
            return self._in_turn(clips)
        if count < ranks and self._is_cut(clips.shape[2:]):
            with self._tiles_shared():
                return self._in_turn(clips)
        return gather_rows(self._in_turn(clips[own_rows(count, self.axis)]), count, self.axis)

    def _in_turn(self, clips: Tensor) -> Tensor:
        """As many at once as fit; fewer if that was too many after all."""
        size, dtype = clips.shape[2:], clips.dtype
        parts: list[Tensor] = []
        done = 0
        while done < len(clips):
            at_once = self.at_once(size, dtype)
            try:
                with together(self.ae):
                    parts.append(self.ae.encode_stored(clips[done : done + at_once]))
                done += at_once
                continue
            except torch.OutOfMemoryError:
                if min(at_once, len(clips)) == 1:
                    raise
            self._known[torch.Size(size), dtype] = max(min(at_once, len(clips)) // 2, 1)
            logger.warning("not enough memory to encode %d clips of %s at once, trying half", at_once, [*size])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return torch.cat(parts)

    def _is_cut(self, size: Sequence[int]) -> bool:
        """Whether a clip is encoded in several tiles."""
        latent = self.ae.get_latent_size(size)
        return self.ae.tiling is not None and self.ae.tiling.largest(latent) != latent

    def _tiles_shared(self) -> AbstractContextManager[None]:
        tiling = self.ae.tiling
        return nullcontext() if tiling is None else self.ae.in_tiles(replace(tiling, runner=TileRunner(self.axis)))


def embed_shared(embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str], axis: Axis) -> Tensor:
    """Texts [B, ...] as a text encoder embeds them; ranks that have the same ones embed a part each and exchange it.

    The first rank, which is the one that writes a log, looks at all of them for what the encoder does not take.
    """
    if axis.size == 1:
        return embed(texts)
    own = own_rows(len(texts), axis)
    others = [text for row, text in enumerate(texts) if row not in own]
    tokenize = getattr(embed, "tokenize", None)
    if axis.first and others and tokenize is not None:
        tokenize(others)
    return gather_rows(embed([texts[row] for row in own]), len(texts), axis)


def own_rows(count: int, axis: Axis) -> list[int]:
    """This rank's rows of ``count``, as many as every rank has; those at the end are filled up with the last one."""
    share = math.ceil(count / axis.size)
    return [min(row, count - 1) for row in range(axis.rank * share, (axis.rank + 1) * share)]


def gather_rows(mine: Tensor, count: int, axis: Axis) -> Tensor:
    """All rows, from every rank's :func:`own_rows`."""
    return collectives.all_gather(mine, axis)[:count]
