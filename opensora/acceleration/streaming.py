"""Weights of blocks that come to the device one block ahead of the computation, and leave it after.

Blocks that fit stay on the device for the whole run, the others share two slots: while one works in the first, the next
comes into the second. Those that come and go are spread evenly among those that stay, so that each copy has the
computation of several blocks to hide behind. On a GPU copies run on a stream of their own, from pinned memory; events
keep a block from working before it is there, and a slot from being written while it is worked in. Values are not
touched: results are the same to the last bit.

The model is a list of blocks in the order in which they run, each by one call; a hook before each does the rest. It may
run backwards too (gradient checkpointing, where blocks are called again in the backward pass): a slot is not written
before another block is called, and what comes next follows from the direction. Blocks whose weights are frozen may have
some that train (adapters): these stay on the device.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.lockstep import Lockstep
from opensora.acceleration.packing import Packed, pack
from opensora.acceleration.placing import bytes_of, placed, tensor_bytes
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.sizes import size_text

logger = get_logger(__name__)


def choose_streamed(sizes: Sequence[int], room: int) -> list[int] | None:
    """Numbers of the blocks that come and go, so that as little as possible has to be copied; None where there is no
    room for any choice.

    Args:
        sizes: bytes of each block.
        room: bytes for those that stay and two slots, each of the size of the largest that comes and goes.
    """
    fitting = [chosen for chosen in _choices(sizes) if held_at_once(sizes, chosen) <= room]
    return min(fitting, key=lambda chosen: sum(sizes[i] for i in chosen), default=None)


def least_room(sizes: Sequence[int]) -> int:
    """The least bytes that blocks can do with."""
    return min(held_at_once(sizes, chosen) for chosen in _choices(sizes))


def _choices(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Blocks up to each size, some of them at equal distances."""
    yield []
    for largest in sorted(set(sizes)):
        among = [i for i, size in enumerate(sizes) if size <= largest]
        for count in range(1, len(among) + 1):
            yield [among[(2 * i + 1) * len(among) // (2 * count)] for i in range(count)]


def held_at_once(sizes: Sequence[int], streamed: Sequence[int]) -> int:
    """Bytes of the blocks that stay and of the slots."""
    moving = [sizes[i] for i in streamed]
    return sum(sizes) - sum(moving) + min(2, len(moving)) * max(moving, default=0)


class _Lane:
    """How blocks get into slots, on a device without streams: at once, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """A point in the computation."""

    def wait(self, arrival: Any) -> None:
        """Have the computation wait for an arrival."""

    def bring(self, block: Packed, memory: Tensor, after: Any) -> Any:
        """Copy a block into a slot once the computation is past ``after``; returns its arrival."""
        block.write(memory)

    def close(self) -> None:
        """Wait for what is on its way."""


class _GpuLane(_Lane):
    """On a GPU: beside the computation. Blocks in pinned memory go directly; others (mapped files) are read into pinned
    buffers, one for each slot, by a thread."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.reader = ThreadPoolExecutor(1, "weights")
        self.staging: dict[int, tuple[Tensor, Any]] = {}  # by slot: pinned buffer, and when it was last sent

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, arrival: Any) -> None:
        event = arrival.result() if isinstance(arrival, Future) else arrival
        torch.cuda.current_stream(self.device).wait_event(event)

    def bring(self, block: Packed, memory: Tensor, after: Any) -> Any:
        pinned = block.pinned()
        if pinned is not None:
            return self._send(pinned, memory, after)
        return self.reader.submit(self._read_and_send, block, memory, after)

    def _send(self, pinned: Tensor, memory: Tensor, after: Any) -> Any:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            memory[: pinned.numel()].copy_(pinned, non_blocking=True)
            return self.stream.record_event()

    def _read_and_send(self, block: Packed, memory: Tensor, after: Any) -> Any:
        slot = memory.data_ptr()
        with torch.cuda.device(self.device):  # of this thread
            if slot not in self.staging:
                self.staging[slot] = torch.empty(memory.numel(), dtype=torch.uint8, pin_memory=True), None
            buffer, sent = self.staging[slot]
            if sent is not None:
                sent.synchronize()
            block.write(buffer)
            event = self._send(buffer[: block.size], memory, after)
        self.staging[slot] = buffer, event
        return event

    def close(self) -> None:
        self.reader.shutdown(wait=True, cancel_futures=True)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.stream.synchronize()  # pinned buffers are given back after
        self.staging.clear()


def lane_to(device: torch.device) -> _Lane:
    """The way to a device."""
    return _GpuLane(device) if device.type == "cuda" else _Lane(device)


class _Slot:
    """Room on the device for one block at a time.

    Attributes:
        block: number of the block that is in it or on its way; None if neither.
        arrival: when it is there.
        free: after which point of the computation it may be written.
    """

    def __init__(self, memory: Tensor, free: Any) -> None:
        self.memory, self.free = memory, free
        self.block: int | None = None
        self.arrival: Any = None


class BlockStream:
    """Brings blocks to a device as they are called.

    Args:
        blocks: in the order in which they run.
        streamed: numbers of those that come and go; the others are there.
        device: where they work.

    Attributes:
        loads: numbers of the blocks that were brought so far, in order.
        together: runs calls of the model that are to share each block's stay.
        slot_bytes: memory of the slots.
    """

    def __init__(self, blocks: Sequence[Packed], streamed: Sequence[int], device: torch.device) -> None:
        self.blocks, self.streamed, self.device = blocks, sorted(streamed), device
        self.loads: list[int] = []
        self.together = Lockstep()
        self.slot_bytes = 0
        self._slots: list[_Slot] = []
        self._working: _Slot | None = None
        self._last = -1

    @contextmanager
    def running(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Have the modules' blocks come when they are called, inside the block."""
        hooks: list[Any] = []
        self._lane = lane_to(self.device)
        try:
            self._make_slots()
            hooks += [module.register_forward_pre_hook(self._hook(i, module)) for i, module in enumerate(modules)]
            self._bring_next(self.streamed[0])
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._retire()
            self._lane.close()
            self._slots.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _make_slots(self) -> None:
        largest = max(self.blocks[i].size for i in self.streamed)
        free = self._lane.mark()
        for _ in range(min(2, len(self.streamed))):
            self._slots.append(_Slot(torch.empty(largest, dtype=torch.uint8, device=self.device), free))
            self.slot_bytes += largest

    def _hook(self, number: int, module: nn.Module) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            self.together.turn()
            self.before(number)

        if getattr(module, "_compiled_call_impl", None) is not None:
            return torch.compiler.disable(before)  # streams and events are no part of a graph
        return before

    def before(self, number: int) -> None:
        """A block is about to run: have it there, and the next one on its way."""
        if self._working is not None and self._working.block != number:
            self._retire()
        backwards = number < self._last and number != 0
        self._last = number
        if number in self.streamed and self._working is None:
            self._work_in(self._slot_of(number) or self._bring(number))
        self._bring_next(self._following(number, backwards))

    def _following(self, number: int, backwards: bool) -> int:
        """The next block that comes and goes, around the end."""
        if backwards:
            return next((i for i in reversed(self.streamed) if i < number), self.streamed[-1])
        return next((i for i in self.streamed if i > number), self.streamed[0])

    def _slot_of(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == number), None)

    def _bring_next(self, number: int) -> None:
        if self._slot_of(number) is None and any(slot is not self._working for slot in self._slots):
            self._bring(number)

    def _bring(self, number: int) -> _Slot:
        """Start a block's way into the slot that was filled first, of those that are not worked in."""
        slot = next(slot for slot in self._slots if slot is not self._working)
        self._slots.remove(slot)
        self._slots.append(slot)
        slot.block = number
        slot.arrival = self._lane.bring(self.blocks[number], slot.memory, slot.free)
        self.loads.append(number)
        return slot

    def _work_in(self, slot: _Slot) -> None:
        assert slot.block is not None
        self._lane.wait(slot.arrival)
        self.blocks[slot.block].show(slot.memory)
        self._working = slot

    def _retire(self) -> None:
        """The block that worked last has: what was computed since then no longer needs its slot."""
        if self._working is not None and self._working.block is not None:
            self.blocks[self._working.block].hide()
            self._working.free = self._lane.mark()
            self._working = None


@contextmanager
def streamed(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    room: int | None,
    pinned: bool = True,
    name: str = "model",
    trains: bool = False,
) -> Iterator[BlockStream | None]:
    """Have a model on a device inside the block, as many of its blocks for the whole time as there is room for.

    Args:
        model: in host memory, where the originals stay.
        blocks: of the model, in the order in which they run.
        device: where it works.
        room: bytes for all weights on the device; None: for all of them.
        pinned: keep the blocks that come and go in pinned memory (on a GPU), for this time and later ones; otherwise
            they stay what they are, parts of mapped files for example.
        name: of the model, for messages.
        trains: leave parameters that require gradients on the device.

    Yields:
        What brings the blocks; None where all are on the device.

    Raises:
        UserError: there is not enough room for any way.
    """
    packed = list(pack(model, blocks, trains))
    sizes = [block.size for block in packed]
    rest = bytes_of(model) - sum(tensor_bytes(tensor) for block in packed for tensor in block.tensors())
    chosen = [] if room is None else choose_streamed(sizes, room - rest)
    if chosen is None:
        raise UserError(
            f"{name}: its weights need {size_text(rest + least_room(sizes))} on the device at least, and "
            f"{size_text(max(room or 0, 0))} are left for them"
        )
    if not chosen:
        with placed(model, device):
            yield None
        return
    logger.info("%s: %d of %d blocks come from the host when they work", name, len(chosen), len(blocks))
    if pinned and device.type == "cuda":
        _pin([packed[i] for i in chosen], name)
    away = {id(tensor) for i in chosen for tensor in packed[i].tensors()}
    stream = BlockStream(packed, chosen, device)
    with placed(model, device, leave=lambda tensor: id(tensor) in away), stream.running(blocks):
        yield stream


def _pin(blocks: Sequence[Packed], name: str) -> None:
    """Have blocks hold their weights in pinned memory, one after another, so that no more than one is there twice."""
    for block in blocks:
        if block.pinned() is not None:
            continue
        try:
            block.move_to(torch.empty(block.size, dtype=torch.uint8, pin_memory=True))
        except RuntimeError as error:
            logger.warning("%s: no more memory can be pinned (%s); copies to the GPU are slower", name, error)
            return
