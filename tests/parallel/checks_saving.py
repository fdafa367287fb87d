"""Checkpoints that several processes write together."""

from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opensora.acceleration.engine import Engine
from opensora.training.checkpoint import content as checkpoint_files
from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.checkpoint.folder import RunningStates, list_checkpoints, load_part, load_weights
from opensora.training.checkpoint.writer import CheckpointWriter
from opensora.training.weights.ema import EMA
from opensora.utils.errors import UserError
from tests.parallel.checks_engines import make_engine, train
from tests.parallel.tiny import context

SMALL = 4000  # bytes: a few tensors of the tiny model


def trained() -> tuple[Engine, EMA]:
    """Sharded weights after a step, and an average of them."""
    place = context()
    engine = make_engine("fsdp2", place)
    train(engine, place, 0, 1, 2)
    ema = EMA(engine.unwrap(), 0.5)
    ema.update(engine.unwrap())
    return engine, ema


def content(engine: Engine, ema: EMA, step: int) -> CheckpointContent:
    weights = engine.gather(engine.unwrap().state_dict())
    average = engine.gather(ema.state_dict())
    optimizers = {"optimizer": engine.state_dict()}
    return CheckpointContent(RunningStates(0, step, step, step), weights, optimizers, average, metadata={"a": "b"})


def assert_same(found: Path, expected: Path) -> None:
    """Bit for bit, in values and order."""
    for name in ("model", "ema"):
        pair = [load_weights(folder, name) for folder in (found, expected)]
        assert pair[0].keys() == pair[1].keys()
        assert all(torch.equal(pair[0][key], value) for key, value in pair[1].items())
    states = [load_part(folder, "optimizer") for folder in (found, expected)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, values in states[1]["state"].items():
        assert values.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(states[0]["state"][index][key], value) for key, value in values.items())


def many_files(folder: Path) -> None:
    """Shards that both ranks wrote hold what one file each holds; so do those written beside training."""
    engine, ema = trained()
    whole = CheckpointWriter(folder / "whole", ranks=engine.ranks).save(content(engine, ema, 1), last=True)
    written: list[int] = []

    def write(state: dict, path: Path, metadata: dict) -> None:
        written.append(len(state))
        save(state, path, metadata)

    save = checkpoint_files.save_safetensors
    with mock.patch.object(checkpoint_files, "save_safetensors", write):
        writer = CheckpointWriter(folder / "cut", ranks=engine.ranks, shard_bytes=SMALL)
        cut = writer.save(content(engine, ema, 1), last=True)
    assert len(written) > 10
    assert (whole / "model" / "model.safetensors").is_file()
    assert len(list((cut / "model").glob("model-*-of-*.safetensors"))) > 3
    assert_same(cut, whole)
    writer = CheckpointWriter(folder / "beside", asynchronous=True, ranks=engine.ranks, shard_bytes=SMALL)
    beside = writer.save(content(engine, ema, 1))
    train(engine, context(), 1, 1, 2)  # changes what is being written, if that is not a copy
    ema.update(engine.unwrap())
    writer.wait()
    assert_same(beside, whole)
    dist.barrier()


def one_rank_fails(folder: Path) -> None:
    """The last good checkpoint stays, nothing is left half-written, and the last one's failure reaches all ranks."""
    engine, ema = trained()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for asynchronous in (False, True):
        place = folder / str(asynchronous)
        writer = CheckpointWriter(place, 1, asynchronous, engine.ranks, SMALL)
        good = writer.save(content(engine, ema, 1))
        writer.wait()
        dist.barrier()
        patch = mock.patch.object(checkpoint_files, "save_safetensors", full)
        with patch if dist.get_rank() == 1 else nullcontext():
            writer.save(content(engine, ema, 2))
            writer.wait()
            with pytest.raises(UserError, match="No space left"):
                writer.save(content(engine, ema, 3), last=True)
        dist.barrier()
        assert sorted(path.name for path in place.iterdir()) == [good.name]
        dist.barrier()
        again = writer.save(content(engine, ema, 4), last=True)  # room again
        dist.barrier()
        assert list_checkpoints(place) == [again]


CHECKS = [many_files, one_rank_fails]
