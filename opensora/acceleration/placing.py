"""Weights on another device: what a module holds, how it gets there, and back.

Parameters may be tensor subclasses made of several plain tensors (quantised weights): they are taken apart and put
together again by torch's own protocol for that, ``__tensor_flatten__``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STAGED = 1 << 26  # bytes of each of the two pinned buffers through which pageable memory goes to a GPU
SMALL = 1 << 20  # tensors below this go as they are


class Held(NamedTuple):
    """A place of a module for a tensor: ``owner[name]``, which held ``tensor`` when it was looked at."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor


def held_by(module: nn.Module) -> list[Held]:
    """All parameters and buffers of a module and those in it."""
    return [
        Held(owner, name, tensor)
        for each in module.modules()
        for owner in (each._parameters, each._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a subclass."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def rebuilt(tensor: Tensor, parts: Iterator[Tensor]) -> Tensor:
    """A tensor like ``tensor``, also in being a parameter, of other plain ones (in the order of `parts_of`)."""
    made = _rebuilt(tensor, parts)
    if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _rebuilt(tensor: Tensor, parts: Iterator[Tensor]) -> Tensor:
    if not hasattr(tensor, "__tensor_flatten__"):
        return next(parts)
    kind: Any = type(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: _rebuilt(getattr(tensor, name), parts) for name in names}
    return kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; of a quantised one, as it is stored."""
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def bytes_of(module: nn.Module) -> int:
    """Bytes of all that a module holds; what is in two places counts once."""
    return sum(tensor_bytes(tensor) for tensor in {id(held.tensor): held.tensor for held in held_by(module)}.values())


def lies_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; ``cuda`` without a number is any."""
    places = {part.device for part in parts_of(tensor)}
    return all(place.type == device.type and device.index in (None, place.index) for place in places)


def is_on(module: nn.Module, device: torch.device) -> bool:
    """Whether all that a module holds is on a device."""
    return all(lies_on(held.tensor, device) for held in held_by(module))


class Mover:
    """Copies tensors to a device. From pageable host memory (mapped files) to a GPU they go through two small pinned
    buffers in turn: several times as fast as directly, and host memory does not grow.

    Args:
        device: where to.
        staged: bytes of each buffer.
        pinned: whether tensors need to go through the buffers; None where the device is a GPU.
    """

    def __init__(self, device: torch.device, staged: int = STAGED, pinned: bool | None = None) -> None:
        self.device, self.size = device, staged
        self.staging = device.type == "cuda" if pinned is None else pinned
        self._buffers: list[Tensor] = []
        self._done: list[Any] = [None, None]
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the device; itself where it is there."""
        if lies_on(tensor, self.device):
            return tensor
        return rebuilt(tensor, iter([self._moved(part.detach()) for part in parts_of(tensor)]))

    def _moved(self, part: Tensor) -> Tensor:
        pageable = part.device.type == "cpu" and not part.is_pinned() if self.staging else False
        if not pageable or not part.is_contiguous() or part.numel() * part.element_size() < SMALL:
            return part.to(self.device, non_blocking=True)
        moved = torch.empty_like(part, device=self.device)
        source, target = (x.view(-1).view(torch.uint8) for x in (part, moved))
        for start in range(0, source.numel(), self.size):
            self._send(source[start : start + self.size], target[start : start + self.size])
        return moved

    def _send(self, source: Tensor, target: Tensor) -> None:
        """One piece; the buffer is written to once its last piece has left."""
        on_gpu = self.device.type == "cuda"
        if not self._buffers:
            self._buffers = [torch.empty(self.size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        turn, self._turn = self._turn, 1 - self._turn
        if self._done[turn] is not None:
            self._done[turn].synchronize()
        buffer = self._buffers[turn][: source.numel()]
        buffer.copy_(source)
        target.copy_(buffer, non_blocking=True)
        if on_gpu:
            self._done[turn] = torch.cuda.current_stream(self.device).record_event()


@contextmanager
def placed(
    module: nn.Module, device: torch.device, leave: Callable[[Tensor], bool] | None = None
) -> Iterator[nn.Module]:
    """Have a module on a device inside the block; the originals stay where they are all the time.

    Args:
        module: whose parameters and buffers are copied, those that share one tensor once.
        device: where to; nothing happens if all are there.
        leave: which tensors stay where they are.
    """
    slots = [held for held in held_by(module) if leave is None or not leave(held.tensor)]
    if all(lies_on(held.tensor, device) for held in slots):
        yield module
        return
    copies: dict[int, Tensor] = {}  # by original: a weight that two modules share is copied once
    move = Mover(device)
    try:
        for owner, name, tensor in slots:
            if id(tensor) not in copies:
                copies[id(tensor)] = move(tensor)
            owner[name] = copies[id(tensor)]
        copies.clear()
        del move
        yield module
    finally:
        for owner, name, tensor in slots:
            owner[name] = tensor
        copies.clear()
