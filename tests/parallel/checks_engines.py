"""Engines beside one process: three optimizer steps, norms, accumulation, and checkpoints from one to another."""

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import AdamW

from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.engine import Engine
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.plugins import check_training, create_engine, divide_model
from opensora.acceleration.sharding import WeightLayout
from opensora.config.options import OptimOptions, PluginOptions
from opensora.training.weights.adapters import TrainedWeights
from opensora.training.weights.ema import EMA
from opensora.training.weights.masters import MasterWeights
from opensora.training.weights.optimizer import create_optimizer
from opensora.utils.errors import UserError
from tests.helpers.live_bytes import bytes_of
from tests.parallel.harness import assert_close
from tests.parallel.tiny import context, loss_of, tiny_inputs, tiny_model

MAX_NORM = 1.0  # below the gradients' norm
STEPS = 3


def make_optimizer(named: Any) -> AdamW:
    return AdamW([parameter for _, parameter in named], lr=1e-2, eps=1e-3)


def make_engine(
    plugin: str, place: ParallelContext, mode: str = "ring_attn", compiled: bool = False, **model_options: Any
) -> Engine:
    model = tiny_model(**model_options).train()
    config, layout = PluginOptions(sequence_parallelism_mode=mode), None
    if compiled:
        layout = divide_model(model, place, config, plugin)
        compile_blocks(model, "aot_eager")
    return create_engine(plugin, model, make_optimizer, place, max_norm=MAX_NORM, config=config, layout=layout)


def batch(step: int, sample: int) -> dict[str, Tensor]:
    return tiny_inputs(seed=10 * step + sample)


def train(engine: Engine, place: ParallelContext, first: int, steps: int, samples: int) -> list[float]:
    """Steps of two micro-batches with ``samples`` of different data each, divided over the dp ranks; their norms."""
    norms = []
    for step in range(first, first + steps):
        for micro in range(2):
            mine = range(samples)[place.dp.rank :: place.dp.size]
            loss = sum(loss_of(engine.model, batch(step, 2 * sample + micro)) for sample in mine) / len(mine) / 2
            if micro == 0:
                with engine.no_sync():
                    engine.backward(loss)
            else:
                engine.backward(loss)
        norms.append(engine.step())
    return norms


def weights(engine: Engine) -> dict[str, Tensor]:
    return dict(engine.gather(engine.unwrap().state_dict()))


def optimizer_state(engine: Engine) -> dict[str, Any]:
    """The whole state, read in the same order by all ranks."""
    state = engine.state_dict()
    return {**state, "state": {index: dict(values) for index, values in state["state"].items()}}


@functools.cache
def expected(samples: int, **model_options: Any) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    """Norms, weights and optimizer state of one process."""
    place = ParallelContext()
    engine = make_engine("none", place, **model_options)
    norms = train(engine, place, 0, STEPS, samples)
    return norms, weights(engine), optimizer_state(engine)


def compare(
    plugin: str,
    mode: str = "ring_attn",
    model_options: dict[str, Any] | None = None,
    compiled: bool = False,
    **sizes: int,
) -> None:
    """Three steps equal those of one process."""
    place, options = context(**sizes), model_options or {}
    engine = make_engine(plugin, place, mode, compiled, **options)
    samples = place.dp.size
    norms, whole, state = expected(samples, **options)
    found = train(engine, place, 0, STEPS, samples)
    assert_close(torch.tensor(found), torch.tensor(norms), f"{plugin} {sizes} norms {found} {norms}")
    compare_states(engine, whole, state, f"{plugin} {mode} {sizes}")


def compare_states(engine: Engine, whole: dict[str, Tensor], state: dict[str, Any], name: str) -> None:
    found, optimizer = weights(engine), optimizer_state(engine)
    assert list(found) == list(whole)
    for key, value in whole.items():
        assert_close(found[key], value, f"{name} {key}")
    assert optimizer["state"].keys() == state["state"].keys()
    for index, values in state["state"].items():
        for key, value in values.items():
            assert_close(optimizer["state"][index][key], value, f"{name} optimizer {index} {key}", limit=1e-4)


def check_ddp(folder: Path) -> None:
    compare("ddp")


def check_fsdp2(folder: Path) -> None:
    compare("fsdp2")


def check_sequence_parallel(folder: Path) -> None:
    for plugin in ("ddp", "fsdp2"):
        compare(plugin, "all_to_all", sp=2)
    compare("fsdp2", "ring_attn", {"grad_ckpt_settings": (1, 2)}, sp=2)


def check_tensor_parallel(folder: Path) -> None:
    compare("ddp", tp=2)
    compare("ddp", model_options={"fused_qkv": True, "use_liger_rope": False}, tp=2)


def check_compiled(folder: Path) -> None:
    """Compiled blocks inside of an engine, recomputed, and divided. However many blocks: one graph of each kind with
    divided weights; with divided tokens, those before, around and after the exchange in attention, seven in all."""
    deep = {"depth": 2, "depth_single_blocks": 3, "grad_ckpt_settings": (1, 3)}
    for plugin, options, sizes, graphs in (("fsdp2", deep, {"sp": 2}, 7), ("ddp", {}, {"tp": 2}, 2)):
        torch._dynamo.reset()
        counters.clear()
        compare(plugin, "ring_attn", options, compiled=True, **sizes)
        assert counters["stats"]["unique_graphs"] == graphs, counters


def check_combined(folder: Path) -> None:
    """Four ranks: tensor or sequence parallel, times data parallel; and both."""
    compare("fsdp2", tp=2)
    compare("fsdp2", "all_to_all", sp=2)
    compare("ddp", "all_to_all", sp=2, tp=2)


def check_hybrid_sharding(folder: Path) -> None:
    """Weights divided over two neighbours and held twice: the numbers of one process, half the bytes on each rank."""
    compare("fsdp2", shard=2)
    compare("fsdp2", "all_to_all", sp=2, shard=2)
    engine = make_engine("fsdp2", context(shard=2))
    parts, whole = engine.unwrap().state_dict(), tiny_model().state_dict()
    assert all(
        parts[name].to_local().numel() == whole[name].numel() // 2 for name in whole if len(whole[name]) % 2 == 0
    )
    for sizes, plugin in (({"shard_size": 3}, "fsdp2"), ({"shard_size": 2}, "ddp")):
        with pytest.raises(UserError, match="shard_size"):
            check_training(plugin, PluginOptions(**sizes), tiny_model(), 4)


def take_over(engine: Engine, saved: list[Any]) -> None:
    """Go on from the whole weights and optimizer state of another engine."""
    engine.load_state_dict(saved[1])
    with torch.no_grad():
        own = engine.unwrap().state_dict()
        for name, value in engine.scatter(saved[0]).items():
            own[name].copy_(value)


def check_other_layouts(folder: Path) -> None:
    """A run goes on under another engine and layout as it would have in one process."""
    samples = 1
    norms, whole, state = expected(samples)
    chain = [("fsdp2", dict(sp=2)), ("ddp", dict(tp=2)), ("ddp", dict(sp=2))]
    saved: list[Any] = [None, None]
    for step, (plugin, sizes) in enumerate(chain):
        place = context(**sizes)
        engine = make_engine(plugin, place, "all_to_all")
        if step:
            take_over(engine, saved)
        found = train(engine, place, step, 1, samples)
        assert_close(torch.tensor(found), torch.tensor(norms[step : step + 1]), f"{plugin} {sizes} norm")
        saved = [weights(engine), optimizer_state(engine)]
    compare_states(engine, whole, state, "chain")


def check_parameter_groups(folder: Path) -> None:
    """Groups with settings of their own train as on one process, also when a run goes on under another engine."""
    groups = {"*.bias": {"weight_decay": 0.3}, "double_blocks": {"lr": 3e-2}}
    optim = OptimOptions(cls="AdamW", lr=1e-2, eps=1e-3, groups=groups)

    def make(plugin: str, place: ParallelContext) -> Engine:
        factory = functools.partial(create_optimizer, optim=optim)
        return create_engine(plugin, tiny_model().train(), factory, place, max_norm=MAX_NORM)

    place, alone = context(), ParallelContext()
    whole, samples = make("none", alone), place.dp.size
    assert [len(group["params"]) > 0 for group in whole.optimizer.param_groups] == [True] * 3
    train(whole, alone, 0, 2, samples)
    saved: list[Any] = []
    for step, plugin in enumerate(("fsdp2", "ddp")):
        engine = make(plugin, place)
        if saved:
            take_over(engine, saved)
        train(engine, place, step, 1, samples)
        saved = [weights(engine), optimizer_state(engine)]
    compare_states(engine, weights(whole), optimizer_state(whole), "groups")
    after = make("none", alone)
    take_over(after, saved)
    assert [group["lr"] for group in after.optimizer.param_groups] == [1e-2, 1e-2, 3e-2]
    assert [group["weight_decay"] for group in after.optimizer.param_groups] == [0.0, 0.3, 0.0]


def check_average_of_sharded_weights(folder: Path) -> None:
    """An EMA of divided weights, or in pieces where they are whole, equals that of one process; it takes half of the
    bytes on each of two ranks, is loaded again, and is shown in the model."""
    alone, place = ParallelContext(), context(sp=2)
    whole: dict[str, Tensor] = {}
    for plugin, where in (("none", alone), ("fsdp2", place), ("ddp", place)):
        engine = make_engine(plugin, where)
        ema = EMA(engine.unwrap(), 0.5, where.replica)
        for step in range(2):
            train(engine, where, step, 1, 1)
            ema.update(engine.unwrap())
        found = dict(engine.gather(ema.state_dict()))
        whole = whole or found
        for name, value in found.items():
            assert_close(value, whole[name], f"{plugin} {name}")
        held = bytes_of(*ema.shadow.values())
        assert held == pytest.approx(bytes_of(*whole.values()) / where.world_size, rel=0.02), plugin
        again = EMA(engine.unwrap(), 0.5, where.replica)
        again.load_state_dict(engine.scatter(whole), 2)
        with again.shown(TrainedWeights(engine.unwrap())):
            shown = {name: value.clone() for name, value in weights(engine).items()}
        for name, value in engine.gather(again.state_dict()).items():
            assert torch.equal(value, whole[name])
            assert torch.equal(shown[name], whole[name])


def check_gradients_are_reduced_in_float32(folder: Path) -> None:
    """bf16 has 8 bits: it would take 256 + 1 for 256, and 128 + 0.5 for 128."""
    place, first = context(), dist.get_rank() == 0
    factors = (256.0 if first else 1.0, 0.5)  # gradients of two micro-batches: means of 128.5 and 0.5
    for plugin, whole in (("ddp", False), ("fsdp2", False), ("fsdp2", True)):
        model = torch.nn.Linear(1, 2, bias=False)
        masters = MasterWeights(model, torch.bfloat16) if plugin == "ddp" else None
        engine = create_engine(
            plugin, model, make_optimizer, place, dtype=torch.bfloat16, layout=WeightLayout(),
            masters=masters.named_parameters() if masters is not None else None,
            config=PluginOptions(whole_gradients=whole),
        )  # fmt: skip
        for micro, factor in enumerate(factors):
            with engine.no_sync() if micro == 0 else nullcontext():
                engine.backward(engine.model(torch.full((1, 1), factor, dtype=torch.bfloat16)).sum())
        assert engine.step() == pytest.approx(129 * 2**0.5, rel=1e-6), (plugin, whole)
    lost = torch.tensor([factors[0]], dtype=torch.bfloat16)
    dist.all_reduce(lost)
    assert float(lost / 2) == 128


def check_bfloat16(folder: Path) -> None:
    """Forward in bf16 with fp32 weights: losses near those of one process in fp32, small updates not lost."""
    for sizes in (dict(), dict(sp=2)):
        place = context(**sizes)
        model = tiny_model().train()
        engine = create_engine("fsdp2", model, make_optimizer, place, max_norm=MAX_NORM, dtype=torch.bfloat16)
        inputs = tiny_inputs(dtype=torch.bfloat16)
        loss = loss_of(engine.model, inputs)
        reference = loss_of(tiny_model(), {name: value.float() for name, value in inputs.items()})
        assert_close(loss.detach(), reference.detach(), "loss", limit=3e-2)
        engine.backward(loss)
        engine.step()
        assert next(iter(engine.unwrap().state_dict().values())).dtype == torch.float32


def check_refusals(folder: Path) -> None:
    """Ranks that disagree about the model are told so before anything hangs."""
    place = context()
    adapted = tiny_model()
    adapted.single_blocks[0].q_proj = torch.nn.Sequential(adapted.single_blocks[0].q_proj)
    for action in (
        lambda: create_engine("ddp", adapted, make_optimizer, context(tp=2)),
        lambda: create_engine("ddp", tiny_model(depth=1 + dist.get_rank()), make_optimizer, place),
        lambda: create_engine("ddp", tiny_model(num_heads=3, hidden_size=24), make_optimizer, context(tp=2)),
    ):
        with pytest.raises(UserError, match="different models|tp_size=2|merge"):
            action()


CHECKS = [
    check_ddp,
    check_fsdp2,
    check_compiled,
    check_sequence_parallel,
    check_tensor_parallel,
    check_other_layouts,
    check_parameter_groups,
    check_average_of_sharded_weights,
    check_gradients_are_reduced_in_float32,
    check_bfloat16,
    check_refusals,
]
FOUR = [check_combined, check_hybrid_sharding]
