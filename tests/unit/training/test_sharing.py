"""Clips through the autoencoder of a training run: as many at once as memory allows."""

import pytest
import torch

from opensora.acceleration.parallel_context import Axis
from opensora.models.autoencoder import Autoencoder
from opensora.models.vae.fitting import MARGIN
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.sharing import ClipEncoder, encode_room, own_rows

SIZE = (9, 32, 32)


@pytest.fixture
def ae(tiny_config):
    torch.manual_seed(0)
    return build_module(dict(tiny_config["ae"]), MODELS, torch_dtype=torch.float32).eval().requires_grad_(False)


def counted(ae: Autoencoder, monkeypatch, limit: int = 1000) -> list[int]:
    """Clips of each call of the network, which has memory for ``limit`` of them."""
    calls, run = [], ae.encode_stored

    def encode(x):
        if x.is_meta:  # it is counted what this takes
            return run(x)
        if len(x) > limit:
            raise torch.OutOfMemoryError
        calls.append(len(x))
        return run(x)

    monkeypatch.setattr(ae, "encode_stored", encode)
    return calls


def test_as_many_at_once_as_memory_allows(ae, monkeypatch):
    clips = torch.randn(7, 3, *SIZE)
    one_by_one = torch.cat([ae.encode_stored(clip[None]) for clip in clips])
    peak = ae.encode_cost(SIZE, torch.float32).peak
    calls = counted(ae, monkeypatch)
    for fit, expected in ((3.5, [3, 3, 1]), (0.1, [1] * 7), (100, [7])):
        found = ClipEncoder(ae, room=int(fit * peak * MARGIN))(clips)
        assert torch.allclose(found, one_by_one, atol=1e-5), "but for what the size of a batch does to the last bits"
        assert calls == expected
        calls.clear()
    ClipEncoder(ae, room=int(3.5 * peak * MARGIN))(torch.randn(7, 3, 1, 32, 32))
    assert calls == [7], "of shorter clips, more fit"


def test_fewer_at_once_where_that_was_too_many(ae, monkeypatch):
    clips = torch.randn(7, 3, *SIZE)
    whole = ae.encode_stored(clips)
    calls = counted(ae, monkeypatch, limit=2)
    encode = ClipEncoder(ae, room=2**40)
    assert torch.allclose(encode(clips), whole, atol=1e-5)
    assert calls == [1] * 7, "7, then 3 did not fit"
    assert encode.at_once(SIZE, torch.float32) == 1, "which is remembered"
    counted(ae, monkeypatch, limit=0)
    with pytest.raises(torch.OutOfMemoryError):
        encode(clips)


def test_the_key_and_what_stands_for_it():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert encode_room("12GB", cpu) == encode_room("12GB", gpu) == 12 * 10**9
    assert encode_room(None, gpu) == 8 * 10**9
    assert encode_room(None, cpu) is None


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_every_row_is_some_ranks(count):
    rows = [own_rows(count, Axis(4, rank)) for rank in range(4)]
    assert len({len(own) for own in rows}) == 1, "all ranks work as much"
    together = [row for own in rows for row in own]
    assert together[:count] == [*range(count)]
    assert {*together[count:]} <= {count - 1}
