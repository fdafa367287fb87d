"""What ranks hold, counted: gradients between micro-batches, weights while a model is divided."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opensora.acceleration.engine import Engine
from opensora.acceleration.materialise import materialise
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.plugins import create_engine, divide_model
from opensora.config.options import PluginOptions
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors
from tests.helpers.live_bytes import LiveBytes, bytes_of, of_model
from tests.parallel.checks_engines import MAX_NORM, batch, compare_states, expected, make_optimizer, train
from tests.parallel.harness import assert_close
from tests.parallel.tiny import SIZES, context, loss_of, tiny_model


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


def filled(plugin: str, place: ParallelContext, path: Path | None) -> tuple[Engine, LiveBytes]:
    """An engine whose model was divided on meta; and what it took to fill it."""
    build = (lambda: tiny_model()) if dist.get_rank() == 0 else None
    section = {"type": "flux", **SIZES, "from_pretrained": path and str(path)}
    with LiveBytes() as live:
        model = build_module(section, MODELS, device_map="meta", torch_dtype=torch.float32).train()
        layout = divide_model(model, place, PluginOptions(), plugin)
        fill = partial(materialise, layout=layout, context=place, build=build)
        if plugin != "fsdp2":
            fill(model)
        engine = create_engine(
            plugin, model, make_optimizer, place, max_norm=MAX_NORM, layout=layout,
            fill=fill if plugin == "fsdp2" else None,
        )  # fmt: skip
        del model
    return engine, live


def check_weights_come_in_parts(folder: Path) -> None:
    """A model that is divided before it has weights: no rank ever holds more than its share and a tensor; from a file,
    and from the first rank."""
    path = folder / "whole.safetensors"
    if dist.get_rank() == 0:
        save_safetensors(tiny_model().state_dict(), path)
    dist.barrier()
    model = tiny_model()
    largest, wanted = max(bytes_of(p) for p in model.parameters()), model.state_dict()
    for plugin, sizes in (("fsdp2", {}), ("ddp", {"tp": 2})):
        place = context(**sizes)
        for source in (path, None):
            engine, live = filled(plugin, place, source)
            share = of_model(engine.unwrap())
            whole = of_model(model) if source is None and dist.get_rank() == 0 else 0  # which has drawn them
            assert share < 0.9 * of_model(model)
            assert live.peak <= 1.01 * share + 2 * largest + whole, (plugin, source, live.peak, share, largest)
            for name, value in engine.gather(engine.unwrap().state_dict()).items():
                assert torch.equal(value, wanted[name]), name


def check_damaged_weights_end_all_ranks(folder: Path) -> None:
    """Whichever rank reads the number that is none."""
    path = folder / "damaged.safetensors"
    if dist.get_rank() == 0:
        state = tiny_model().state_dict()
        state["txt_in.weight"][-1, -1] = torch.nan  # of the last rank
        save_safetensors(state, path)
    dist.barrier()
    with pytest.raises(UserError, match=r"damaged.safetensors: txt_in.weight is not finite"):
        filled("fsdp2", context(), path)


CHECKS = [check_accumulated_gradients, check_weights_come_in_parts, check_damaged_weights_end_all_ranks]
FOUR = [check_accumulated_between_groups]
