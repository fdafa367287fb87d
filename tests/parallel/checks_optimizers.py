"""Optimizers on divided weights beside one process: updates, states, and going on elsewhere."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.acceleration.engine import Engine, SingleEngine
from opensora.acceleration.plugins import create_engine
from opensora.acceleration.sharding import WeightLayout
from opensora.config.options import OptimOptions
from opensora.training.weights.optimizer import create_optimizer
from tests.helpers.live_bytes import bytes_of
from tests.parallel.checks_engines import optimizer_state, weights
from tests.parallel.tiny import context

ROWS = (31, 40, 20, 1, 64)  # of five matrices, of which two ranks have unequal parts, and one of them none


class Net(nn.Module):
    """Blocks that are matrices with 256 columns, and biases; one bias is large enough for 8 bits."""

    def __init__(self, large: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(256, rows) for rows in ROWS)
        self.large = nn.Parameter(torch.randn(large))


def engine_of(plugin: str, cls: str, large: int = 64) -> Engine:
    config = OptimOptions(cls=cls, lr=1e-2, weight_decay=0.1)

    def make(named: Any) -> Any:
        return create_optimizer(named, config)

    net = Net(large)
    if plugin == "none":
        return SingleEngine(net, make([*net.named_parameters()]))
    return create_engine(plugin, net, make, context(), layout=WeightLayout())


def steps(engine: Engine, first: int, last: int) -> None:
    """Updates by gradients that follow from the number of the step."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in Net().named_parameters()}
        named = dict(engine.unwrap().named_parameters())
        grads["large"] = torch.randn(named["large"].shape, generator=generator)
        for name, grad in engine.scatter(grads, named).items():
            named[name].grad = grad
        engine.step()


def compare(found: Engine, expected: Engine) -> None:
    """Weights and states, bit for bit."""
    own, whole = optimizer_state(found), optimizer_state(expected)
    for name, value in weights(found).items():
        assert torch.equal(value, weights(expected)[name]), name
    for index, values in whole["state"].items():
        assert values.keys() == own["state"][index].keys()
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(own["state"][index][key]), torch.as_tensor(value)), (index, key)


def moved(engine: Engine, plugin: str, cls: str) -> Engine:
    """Another engine that goes on from this one's weights and state."""
    other, state, values = engine_of(plugin, cls), copy.deepcopy(optimizer_state(engine)), weights(engine)
    other.load_state_dict(state)
    with torch.no_grad():
        own = other.unwrap().state_dict()
        for name, value in other.scatter(values).items():
            own[name].copy_(value)
    return other


def held(engine: Engine) -> int:
    moments = [x for state in engine.optimizer.state.values() for key, x in state.items() if key[:4] != "qmap"]
    return bytes_of(*(x for x in moments if isinstance(x, Tensor) and x.ndim))


@torch.no_grad()
def check_optimizers_of_rows(folder: Path) -> None:
    """Distributed Muon, and AdamW in 8 bits, do what they do in one process; a run goes on under another engine."""
    for cls in ("Muon", "AdamW8bit"):
        alone, divided = engine_of("none", cls), engine_of("fsdp2", cls)
        for engine in (alone, divided):
            steps(engine, 0, 3)
        compare(divided, alone)
        shares = torch.tensor([held(divided)], dtype=torch.float64)
        dist.all_reduce(shares)
        assert float(shares) == held(alone)
        onward = [moved(alone, "fsdp2", cls), moved(divided, "none", cls), moved(divided, "fsdp2", cls), alone]
        for engine in onward:
            steps(engine, 3, 5)
        for engine in onward[:-1]:
            compare(engine, alone)


@torch.no_grad()
def check_moments_change_their_form(folder: Path) -> None:
    """A large bias has moments in 8 bits in one process and in fp32 where it is divided: each stands for the other."""
    alone, divided = (engine_of(plugin, "AdamW8bit", large=5000) for plugin in ("none", "fsdp2"))
    steps(alone, 0, 2)
    (large,) = (index for index, name in enumerate(divided._names) if name == "large")  # type: ignore[attr-defined]
    state = optimizer_state(alone)
    assert state["state"][large]["state1"].dtype == torch.uint8
    divided.load_state_dict(state)
    whole = optimizer_state(divided)
    assert whole["state"][large]["state1"].dtype == torch.float32
    again = engine_of("none", "AdamW8bit", large=5000)
    again.load_state_dict(whole)
    third = engine_of("fsdp2", "AdamW8bit", large=5000)
    third.load_state_dict(optimizer_state(again))
    twice = optimizer_state(third)["state"][large]
    for key in ("state1", "state2"):
        value = whole["state"][large][key]
        assert value.abs().max() > 0
        assert (twice[key] - value).abs().max() <= 0.02 * value.abs().max()
    steps(divided, 2, 3)
    with pytest.raises(ValueError, match="number of parameter groups"):
        engine_of("none", "Muon").load_state_dict(whole)


CHECKS = [check_optimizers_of_rows, check_moments_change_their_form]
