"""Blocks that come to the device when they work: when, how many at a time, and with the same numbers."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.acceleration import streaming
from opensora.acceleration.packing import Packed, pack
from opensora.acceleration.placing import Mover, held_by, parts_of, placed, rebuilt, tensor_bytes
from opensora.acceleration.scratch import ScratchFile, is_in, mapped_ranges
from opensora.acceleration.streaming import choose_streamed, least_room, streamed
from opensora.utils.errors import UserError

CPU = torch.device("cpu")
BLOCK = 3 * 512  # of a block below, aligned: weight, bias and buffer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) * self.scale


class Tower(nn.Module):
    def __init__(self, count=6):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.out = nn.Linear(8, 8)

    def forward(self, x, skip=()):
        for number, block in enumerate(self.blocks):
            x = x if number in skip else block(x)
        return self.out(x)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower().requires_grad_(False)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
REST = 4 * 72  # of the layer outside of the blocks


def room_for(blocks: int) -> int:
    return REST + blocks * BLOCK


@pytest.mark.parametrize("room", [2, 3, 4, 5, 6, None])
def test_same_numbers_and_places(tower, room):
    expected, places = tower(X), [held.tensor.data_ptr() for held in held_by(tower)]
    with streamed(tower, tower.blocks, CPU, None if room is None else room_for(room)) as stream:
        for _ in range(3):
            assert torch.equal(tower(X), expected)
        assert (stream is None) == (room in (6, None)), "all fit"
    assert [held.tensor.data_ptr() for held in held_by(tower)] == places
    assert not any(block._forward_pre_hooks for block in tower.blocks)


def test_one_ahead_of_the_computation(tower):
    """A block comes when the one before it starts, also from one run to the next."""
    seen = []
    for number, block in enumerate(tower.blocks):
        block.linear.register_forward_pre_hook(lambda *_, number=number: seen.append((number, [*stream.loads])))
    with streamed(tower, tower.blocks, CPU, room_for(2)) as stream:
        assert stream.loads == [0]
        tower(X)
        tower(X)
        assert stream.slot_bytes == 2 * BLOCK
    assert [number for number, _ in seen] == [*range(6)] * 2
    assert [loads for _, loads in seen] == [[*range(6), *range(6), 0][: 2 + step] for step in range(12)]


class LateLane(streaming._Lane):
    """Copies as late as they may come: when the computation waits for them. Reads what was asked for, or nothing."""

    def bring(self, block, memory, after):
        memory.fill_(255)  # from now on the slot is not what it was
        return lambda: block.write(memory)

    def wait(self, arrival):
        arrival()


@pytest.mark.parametrize("room", [2, 3, 5])
def test_the_computation_waits_for_its_weights(tower, room, monkeypatch):
    expected = tower(X)
    monkeypatch.setattr(streaming, "lane_to", LateLane)
    with streamed(tower, tower.blocks, CPU, room_for(room)):
        for skip in ((), (1, 2), ()):
            tower(X, skip)
        assert torch.equal(tower(X), expected)


class Log:
    """Stands for torch.cuda where there is none: streams and events that note what is done, copies happen at once."""

    def __init__(self):
        self.entries = []

    def Stream(self, device):
        return LoggedStream("copies", self)

    def current_stream(self, device):
        return LoggedStream("computation", self)

    def stream(self, stream):
        return nullcontext()

    def device(self, device):
        return nullcontext()


class LoggedStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.entries.append((self.name, "mark"))
        return Event(len(self.log.entries))

    def wait_event(self, event):
        self.log.entries.append((self.name, "wait", event.number))

    def wait_stream(self, stream):
        self.log.entries.append((self.name, "wait for", stream.name))

    def synchronize(self):
        pass


class Event:
    def __init__(self, number):
        self.number = number

    def synchronize(self):
        pass


@pytest.mark.parametrize("is_pinned", [True, False])
def test_streams_and_events_of_a_gpu(tower, monkeypatch, is_pinned):
    """Each copy waits for the computation that last used its slot, each block for its copy; from files by a thread."""
    log, empty, expected = Log(), torch.empty, tower(X)
    monkeypatch.setattr(streaming.torch, "cuda", log)
    monkeypatch.setattr(streaming.torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    monkeypatch.setattr(streaming, "lane_to", streaming._GpuLane)
    if is_pinned:
        for packed in pack(tower, tower.blocks):
            packed.move_to(torch.zeros(packed.size, dtype=torch.uint8))
        monkeypatch.setattr(Packed, "pinned", Packed.common_memory)
    with streamed(tower, tower.blocks, CPU, room_for(2), pinned=False) as stream:
        assert all(torch.equal(tower(X), expected) for _ in range(3))
        for slot in stream._slots:  # what the end would take back from the thread before it begins
            if not is_pinned:
                slot.arrival.result()
        buffers = dict(stream._lane.staging)
    monkeypatch.undo()
    assert len(buffers) == (0 if is_pinned else 2)
    marks = {number + 1: entry[0] for number, entry in enumerate(log.entries) if entry[1] == "mark"}
    waits = [(entry[0], marks[entry[2]]) for entry in log.entries if entry[1] == "wait"]
    assert waits.count(("computation", "copies")) == 18, "before each block"
    assert waits.count(("copies", "computation")) == 19 == len(stream.loads)
    assert log.entries[-1] == ("computation", "wait for", "copies")
    freed = [entry[2] for entry in log.entries if entry[:2] == ("copies", "wait")]
    assert freed == sorted(freed), "each for a later point than the one before"
    assert len(set(freed)) == 18, "the first two for the same"


def test_those_that_stay_are_spread_between_the_others():
    sizes = [10] * 12
    assert choose_streamed(sizes, 120) == []
    assert choose_streamed(sizes, 119) == [2, 6, 10], "two slots take the room of two that stay"
    assert choose_streamed(sizes, 20) == [*range(12)]
    assert choose_streamed(sizes, 19) is None
    assert least_room(sizes) == 20
    assert least_room([10]) == 10
    assert least_room([]) == 0
    assert choose_streamed([40, 40, 10, 10, 10, 10], 110) == [2, 4, 5], "slots are of the smaller size"
    assert choose_streamed([40, 40, 10, 10, 10, 10], 80) == [*range(6)]


def test_no_more_is_copied_than_comes_and_goes(tower):
    with streamed(tower, tower.blocks, CPU, room_for(5)) as stream:
        moving = list(stream.streamed)
        for _ in range(4):
            tower(X)
    assert len(moving) == 3
    assert stream.loads[:12] == moving * 4


def test_counted_bytes_stay_within_the_room(tower, monkeypatch):
    """What is on the device: slots, and what `placed` copies there."""
    made = []
    monkeypatch.setattr(Mover, "__call__", lambda self, tensor: (made.append(tensor_bytes(tensor)), tensor.clone())[1])
    meta = torch.device("meta")
    monkeypatch.setattr(streaming.torch, "empty", lambda *size, **_: torch.zeros(*size, dtype=torch.uint8))
    for room in (2, 3, 4, 5):
        made.clear()
        with streamed(tower, tower.blocks, meta, room_for(room)) as stream:
            assert sum(made) + stream.slot_bytes <= room_for(room)
            assert len(stream.streamed) == 8 - room, "and use it"


def test_nothing_is_left_after_an_error(tower):
    places, expected = [held.tensor.data_ptr() for held in held_by(tower)], tower(X)

    class Broken(Exception):
        pass

    def fail(*_):
        raise Broken

    hook = tower.blocks[3].linear.register_forward_pre_hook(fail)
    with pytest.raises(Broken), streamed(tower, tower.blocks, CPU, room_for(2)) as stream:
        tower(X)
    hook.remove()
    assert [held.tensor.data_ptr() for held in held_by(tower)] == places
    assert (stream._slots, stream._working) == ([], None)
    assert torch.equal(tower(X), expected)


def test_blocks_may_be_left_out_or_run_again(tower):
    """As step caches do."""
    skips = [(), (1, 2, 3, 4, 5), (0, 1), (), (5,), (2, 4), ()]
    expected = [tower(X, skip) for skip in skips]
    for room in (2, 4):
        with streamed(tower, tower.blocks, CPU, room_for(room)):
            assert all(torch.equal(tower(X, skip), each) for skip, each in zip(skips, expected))


def test_too_little_room_is_refused_with_the_least(tower):
    with pytest.raises(UserError, match=r"t5: its weights need 0\.0 MiB on the device at least"):
        streamed(tower, tower.blocks, CPU, room_for(2) - 1, name="t5").__enter__()


def test_what_blocks_share_stays():
    tower = Tower(4).requires_grad_(False)
    tower.blocks[1].linear.weight = tower.blocks[2].linear.weight
    tower.out.bias = tower.blocks[3].linear.bias
    expected = tower(X)
    with streamed(tower, tower.blocks, CPU, 544 + 2 * BLOCK) as stream:
        assert torch.equal(tower(X), expected)
        held = [id(tensor) for block in stream.blocks for tensor in block.tensors()]
    assert id(tower.blocks[1].linear.weight) not in held
    assert id(tower.out.bias) not in held


class Adapted(nn.Module):
    """A frozen block with something that trains beside it."""

    def __init__(self, block):
        super().__init__()
        self.block, self.beside = block.requires_grad_(False), nn.Linear(8, 8)

    def forward(self, x):
        return self.block(x) + self.beside(x)


def test_frozen_blocks_of_a_model_that_trains_go_backwards_too(tower):
    """With recomputed blocks: each comes once on the way forth, and once on the way back."""
    tower.blocks = nn.ModuleList(Adapted(block) for block in tower.blocks)

    def gradients():
        tower.zero_grad()
        x = X.clone().requires_grad_()
        for block in tower.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        tower.out(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None]

    expected = gradients()
    with streamed(tower, tower.blocks, CPU, REST + 6 * 288 + 2 * BLOCK, trains=True) as stream:
        found = gradients()
        assert stream.loads[:6] == [*range(6)]
        back = [number for number in stream.loads[6:] if number != 0]
        assert back[-4:] == [4, 3, 2, 1], "in the order of the backward pass"
    assert len(found) == 12
    assert all(map(torch.equal, found, expected))


# ------------------------------------------------------------------------------------------------- tensors of tensors


class Scaled(Tensor):
    """A weight as small whole numbers and a scale per row, like quantised ones."""

    @staticmethod
    def __new__(cls, whole, scale):
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["whole"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        plain = [each.whole * each.scale[:, None] if isinstance(each, cls) else each for each in args]
        return function(*plain, **(kwargs or {}))


def scaled(linear):
    weight = linear.weight.detach()
    scale = weight.abs().amax(dim=1) / 127
    whole = (weight / scale[:, None]).round().to(torch.int8)
    linear.weight = nn.Parameter(Scaled(whole, scale), requires_grad=False)


def test_quantised_weights_come_as_they_are_stored(tower):
    for block in tower.blocks:
        scaled(block.linear)
    assert tensor_bytes(tower.blocks[0].linear.weight) == 64 + 32
    expected = tower(X)
    with streamed(tower, tower.blocks, CPU, REST + 2 * 4 * 512) as stream:
        assert torch.equal(tower(X), expected)
        seen = tower.blocks[5].linear.weight
        assert isinstance(seen, nn.Parameter)
        assert isinstance(seen, Scaled)
        assert seen.whole.dtype == torch.int8
        assert any(seen.whole.untyped_storage().data_ptr() == slot.memory.data_ptr() for slot in stream._slots)
    moved = rebuilt(tower.blocks[0].linear.weight, iter([part.clone() for part in parts_of(seen)]))
    assert isinstance(moved, Scaled)


def test_packed_tensors_keep_their_order_of_dimensions():
    block = nn.Module()
    block.a = nn.Parameter(torch.randn(4, 6).t(), requires_grad=False)
    block.b = nn.Parameter(torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), requires_grad=False)
    block.register_buffer("c", torch.tensor(3))
    block.register_buffer("d", torch.ones(0, dtype=torch.bool))
    block.register_buffer("e", torch.randn(8)[::2])
    before = {held.name: held.tensor.clone() for held in held_by(block)}
    packed = Packed(block)
    packed.move_to(torch.empty(packed.size, dtype=torch.uint8))
    for held in held_by(block):
        assert torch.equal(held.tensor, before[held.name])
        assert isinstance(held.tensor, nn.Parameter) == (held.name in "ab")
    again = Packed(block)
    assert again.common_memory().data_ptr() == packed.pieces[0].like.data_ptr(), (
        "known again, so nothing is pinned twice"
    )
    assert again.common_memory().numel() == packed.size
    assert block.a.stride() == (1, 6)
    assert block.b.is_contiguous(memory_format=torch.channels_last)


def test_copies_through_small_buffers(tower):
    """Pieces of 100 bytes, in turn; each buffer is written to again only when it was sent."""
    move = Mover(torch.device("meta"), staged=100, pinned=True)
    move.device = CPU
    big = torch.randn(1000, 600).to(torch.bfloat16)
    assert torch.equal(move._moved(big), big)
    assert [buffer.numel() for buffer in move._buffers] == [100, 100]


def test_weights_that_are_in_no_file_go_to_one(tower, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora.acceleration.scratch.SMALL", 1)
    expected = tower(X)
    scratch = ScratchFile(tmp_path)
    scratch.take(tower.blocks)
    ranges, size = mapped_ranges(), scratch.size
    held = [held.tensor for held in held_by(tower.blocks)]
    assert size == 6 * 4096
    assert all(is_in(tensor, ranges) for tensor in held)
    assert not is_in(tower.out.weight, ranges)
    scratch.take(tower.blocks)
    assert scratch.size == size, "nothing goes there twice"
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    with streamed(tower, tower.blocks, CPU, room_for(2), pinned=False):
        assert torch.equal(tower(X), expected)
    assert torch.equal(tower(X), expected)


def test_single_tensors_go_to_the_file(tmp_path, monkeypatch):
    scratch, tensor = ScratchFile(tmp_path), torch.randn(5, 7).to(torch.bfloat16)
    assert scratch.keep(tensor) is tensor, "a small one"
    monkeypatch.setattr("opensora.acceleration.scratch.SMALL", 1)
    filed = scratch.keep(tensor)
    assert torch.equal(filed, tensor)
    assert is_in(filed, mapped_ranges())
    assert scratch.keep(filed) is filed


def test_a_full_disk_is_told(tower, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora.acceleration.scratch.SMALL", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"offload disk: .* has no room for .*No space left.*set TMPDIR"):
        ScratchFile(tmp_path).take(tower.blocks)


def test_placed_leaves_what_is_to_be_left(tower):
    with placed(tower, torch.device("meta"), leave=lambda tensor: tensor is tower.out.weight):
        assert tower.out.bias.is_meta
        assert not tower.out.weight.is_meta
