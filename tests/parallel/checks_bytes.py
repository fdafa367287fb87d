"""What ranks hold, counted: gradients between micro-batches."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opensora.acceleration.engine import Engine
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.plugins import create_engine
from opensora.config.options import PluginOptions
from tests.helpers.live_bytes import LiveBytes, of_model
from tests.parallel.checks_engines import MAX_NORM, batch, compare_states, expected, make_optimizer, train
from tests.parallel.harness import assert_close
from tests.parallel.tiny import context, loss_of, tiny_model


def accumulating(place: ParallelContext, whole: bool) -> Engine:
    config = PluginOptions(whole_gradients=whole)
    return create_engine("fsdp2", tiny_model().train(), make_optimizer, place, max_norm=MAX_NORM, config=config)


def kept_between(engine: Engine) -> int:
    """Bytes that the first of several micro-batches leaves behind."""
    with LiveBytes() as live, engine.no_sync():
        loss = loss_of(engine.model, batch(0, dist.get_rank()))
        engine.backward(loss)
        del loss
        return live.now


def check_accumulated_gradients(folder: Path) -> None:
    """Divided between micro-batches, unless whole ones are asked for; steps are those of one process both times."""
    place = context()
    norms, weights, state = expected(place.dp.size)
    share = of_model(tiny_model()) // dist.get_world_size()
    for whole in (False, True):
        kept = kept_between(accumulating(place, whole))
        wanted = share * dist.get_world_size() if whole else share
        assert kept == pytest.approx(wanted, rel=0.1), (whole, kept, wanted)
        engine = accumulating(place, whole)
        found = train(engine, place, 0, len(norms), place.dp.size)
        assert_close(torch.tensor(found), torch.tensor(norms), f"whole {whole}: norms")
        compare_states(engine, weights, state, f"whole {whole}")


def check_accumulated_between_groups(folder: Path) -> None:
    """Of groups that hold the same shares: divided between micro-batches, and averaged between groups once a step."""
    place = context(shard=2)
    engine = accumulating(place, whole=False)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        kept = kept_between(engine)
        assert reduced.call_count == 0
        engine.backward(loss_of(engine.model, batch(0, dist.get_rank())))
        assert reduced.call_count == len([*engine.model.double_blocks, *engine.model.single_blocks]) + 1
    assert kept == pytest.approx(of_model(tiny_model()) / 2, rel=0.1)


CHECKS = [check_accumulated_gradients]
FOUR = [check_accumulated_between_groups]
