"""What a block holds, side by side in one piece of memory: so that it goes to a device in one copy."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.placing import Held, held_by, parts_of, rebuilt

ALIGNMENT = 512  # bytes; what a GPU's allocator gives


def aligned(count: int) -> int:
    """Bytes that a tensor of so many takes among others."""
    return -(-count // ALIGNMENT) * ALIGNMENT


class Piece(NamedTuple):
    """Room of a plain tensor in the memory of its block: where it starts, in bytes, and what it is like."""

    start: int
    like: Tensor

    @property
    def end(self) -> int:
        """Where what is left free after it starts."""
        return self.start + self.like.numel() * self.like.element_size()

    def within(self, memory: Tensor) -> Tensor:
        """The tensor's place in a piece of memory [bytes] uint8, with its shape and its order of dimensions."""
        flat = memory[self.start : self.end].view(self.like.dtype)
        strides = self.like.stride()
        order = sorted(range(self.like.ndim), key=lambda dim: (-strides[dim], dim))
        if not self.like.permute(order).is_contiguous():
            order = [*range(self.like.ndim)]
        back = [order.index(dim) for dim in range(self.like.ndim)]
        return flat.view([self.like.shape[dim] for dim in order]).permute(back)


class Packed:
    """The parameters and buffers of a block, and the way into one piece of memory.

    Args:
        block: a module.
        leave: tensors by id that stay where they are.
        trains: parameters that require gradients stay where they are, too.
    """

    def __init__(self, block: nn.Module, leave: Collection[int] = (), trains: bool = False) -> None:
        self.held: list[Held] = [
            held
            for held in held_by(block)
            if id(held.tensor) not in leave and not (trains and held.tensor.requires_grad)
        ]
        self.pieces: list[Piece] = []
        self.size = 0
        self._pinned: Tensor | None = None
        for tensor in self.tensors():
            for part in parts_of(tensor):
                self.pieces.append(Piece(self.size, part.detach()))
                self.size += aligned(self.pieces[-1].end - self.size)

    def tensors(self) -> list[Tensor]:
        """Each once."""
        return [*{id(held.tensor): held.tensor for held in self.held}.values()]

    @torch.no_grad()
    def write(self, memory: Tensor) -> None:
        """Copy everything into a piece of memory [at least `size` bytes] uint8."""
        for piece in self.pieces:
            piece.within(memory).copy_(piece.like)

    @torch.no_grad()
    def show(self, memory: Tensor) -> None:
        """Have the block work with what is in a piece of memory."""
        self._hold(memory)

    def hide(self) -> None:
        """Have the block hold its own tensors."""
        for owner, name, tensor in self.held:
            owner[name] = tensor

    @torch.no_grad()
    def move_to(self, memory: Tensor) -> None:
        """Have the block hold its own tensors in another piece of host memory, for good."""
        self.write(memory)
        self.held = self._hold(memory)
        self.pieces = [Piece(piece.start, piece.within(memory)) for piece in self.pieces]
        self._pinned = memory[: self.size] if memory.is_pinned() else None

    def _hold(self, memory: Tensor) -> list[Held]:
        views = iter([piece.within(memory) for piece in self.pieces])
        shown = {id(tensor): rebuilt(tensor, views) for tensor in self.tensors()}
        for owner, name, tensor in self.held:
            owner[name] = shown[id(tensor)]
        return [Held(owner, name, shown[id(tensor)]) for owner, name, tensor in self.held]

    def pinned(self) -> Tensor | None:
        """The piece of memory that the block's own tensors are in, if it is pinned and they are packed as here."""
        if self._pinned is None and self.pieces and all(piece.like.is_pinned() for piece in self.pieces):
            self._pinned = self.common_memory()
        return self._pinned

    def common_memory(self) -> Tensor | None:
        """The piece of memory that the block's own tensors are in, if they are packed as here."""
        storage = self.pieces[0].like.untyped_storage()
        base, start = storage.data_ptr(), self.pieces[0].like.data_ptr() - storage.data_ptr()
        for piece in self.pieces:
            apart = piece.like.untyped_storage().data_ptr() != base
            if apart or (piece.like.numel() and piece.like.data_ptr() - base != start + piece.start):
                return None
        if start + self.size > storage.nbytes():
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage, start, (self.size,), (1,))


def shared_tensors(model: nn.Module, blocks: Collection[nn.Module]) -> set[int]:
    """Ids of tensors of blocks that other blocks hold too, or what is no block: they cannot come and go with one."""
    owners: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for held in held_by(block):
            owners.setdefault(id(held.tensor), set()).add(number)
    inside = {id(each.owner) for block in blocks for each in held_by(block)}
    for held in held_by(model):
        if id(held.owner) not in inside and id(held.tensor) in owners:
            owners[id(held.tensor)].add(-1)
    return {tensor for tensor, numbers in owners.items() if len(numbers) > 1}


def pack(model: nn.Module, blocks: Collection[nn.Module], trains: bool = False) -> Iterator[Packed]:
    """All blocks of a model, without what they share; ``trains`` as of :class:`Packed`."""
    leave = shared_tensors(model, blocks)
    return (Packed(block, leave, trains) for block in blocks)
