"""Gradient checkpointing by kind of block, with room in host memory for what waits for the backward pass."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from opensora.models.diffusion import DiffusionModel
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

ALIGNMENT = 256  # bytes; keeps copies on boundaries that every device likes


class HostBuffer:
    """A block of host memory of fixed size, lent out in pieces.

    Args:
        size: bytes.
        pinned: page-locked, so that copies from and to a GPU run beside computation.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._free = [(0, size)]  # (offset, size), by offset, never adjacent
        self._lock = threading.Lock()  # the backward pass of a GPU runs in a thread of its own

    def take(self, like: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
        """Room for a tensor: a view of its shape and dtype, and the piece to hand to `give_back`. None if full."""
        need = -(-like.numel() * like.element_size() // ALIGNMENT) * ALIGNMENT
        with self._lock:
            for i, (offset, size) in enumerate(self._free):
                if size >= need:
                    self._free[i : i + 1] = [(offset + need, size - need)] if size > need else []
                    raw = self._memory[offset : offset + like.numel() * like.element_size()]
                    return raw.view(like.dtype).view(like.shape), (offset, need)
        return None

    def give_back(self, piece: tuple[int, int]) -> None:
        """Free a piece."""
        with self._lock:
            merged: list[tuple[int, int]] = []
            for offset, size in sorted([*self._free, piece]):
                if merged and sum(merged[-1]) == offset:
                    merged[-1] = (merged[-1][0], merged[-1][1] + size)
                else:
                    merged.append((offset, size))
            self._free = merged

    @property
    def free_bytes(self) -> int:
        """Bytes not lent out."""
        return sum(size for _, size in self._free)


class _Parked:
    """A tensor in host memory; on a GPU it goes there and comes back on a stream of its own."""

    def __init__(self, tensor: Tensor, room: Tensor, stream: Any, before: "_Parked | None") -> None:
        self.room, self.device, self.stream = room, tensor.device, stream
        self.before = weakref.ref(before) if before is not None else None
        self._back: Tensor | None = None
        self._ready: Any = None
        if stream is None:
            room.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            room.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy is done

    def fetch(self) -> None:
        """Start the way back."""
        if self._back is not None or self.stream is None:
            return
        with torch.cuda.stream(self.stream):
            self._back = self.room.to(self.device, non_blocking=True)
            self._ready = self.stream.record_event()

    def get(self) -> Tensor:
        """The tensor on its device; the one parked before it, needed next, starts its way back too."""
        if self.stream is None:
            return self.room.clone()
        self.fetch()
        before = self.before() if self.before is not None else None
        if before is not None:
            before.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._ready)
        assert self._back is not None
        back, self._back = self._back, None
        back.record_stream(current)
        return back


class OffloadedRecompute:
    """Runs a block so that only its input tokens are kept, and those in host memory.

    What does not fit into the buffer stays on the device.

    Args:
        size: bytes of the buffer.
        device: where the model is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.buffer = HostBuffer(size, pinned=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._last: Callable[[], _Parked | None] | None = None
        self._warned = False

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """``block(*args)``; the last two arguments (vector and rotary table) are the same for all blocks and stay."""
        tokens = {tensor.data_ptr() for tensor in args[:-2]}

        def pack(tensor: Tensor) -> Tensor | _Parked:
            if tensor.data_ptr() not in tokens or not tensor.is_contiguous():
                return tensor
            return self._park(tensor)

        def unpack(kept: Tensor | _Parked) -> Tensor:
            return kept.get() if isinstance(kept, _Parked) else kept

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(block, *args, use_reentrant=False)

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        taken = self.buffer.take(tensor)
        if taken is None:
            if not self._warned:
                logger.warning(
                    "grad_ckpt_buffer_size: the buffer is full, further inputs of recomputed blocks stay on the device"
                )
                self._warned = True
            return tensor
        room, piece = taken
        parked = _Parked(tensor, room, self._stream, self._last() if self._last is not None else None)
        self._last = weakref.ref(parked)
        weakref.finalize(parked, self.buffer.give_back, piece)
        return parked


def apply_recompute(model: DiffusionModel, enabled: bool, buffer_size: int, device: torch.device) -> None:
    """Set up gradient checkpointing.

    Args:
        model: see :meth:`DiffusionModel.set_grad_checkpoint`.
        enabled: ``grad_checkpoint`` of the training config.
        buffer_size: bytes of host memory for the inputs of those blocks; 0 keeps them on the device.
        device: where the model is.
    """
    model.set_grad_checkpoint(enabled)
    if enabled and buffer_size:
        model.recompute = OffloadedRecompute(buffer_size, device)
