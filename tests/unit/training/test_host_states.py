"""Optimizer states in host memory, and updates in the backward pass: the plain run's numbers, in less memory."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.plugins import create_engine
from opensora.config import parse_config
from opensora.config.commands import LoopOptions, TrainOptions
from opensora.config.options import OptimOptions, PluginOptions
from opensora.training.checkpoint.folder import load_part, load_weights
from opensora.training.checks import check_optimizer
from opensora.training.diffusion.trainer import Trainer
from opensora.training.weights.masters import MasterWeights, optimizer_factory
from opensora.utils.errors import UserError
from tests.helpers.live_bytes import LiveBytes
from tests.parallel.checks_training import tiny_run

LAYERS, WIDTH = 6, 64
OPTIMIZERS = ["AdamW", "Muon", "AdamW8bit"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def engine_of(cls, bf16=True, **options):
    if cls == "AdamW8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    config = OptimOptions(cls=cls, lr=1e-2, weight_decay=0.1, **options)
    model = Net().to(torch.bfloat16 if bf16 else torch.float32)
    masters = MasterWeights(model, host=config.states == "host") if bf16 else None
    engine = create_engine(
        "none", model, optimizer_factory(config, masters), ParallelContext(),
        masters=masters.named_parameters() if masters is not None else None, in_backward=config.in_backward,
    )  # fmt: skip
    return engine, model, masters


def train(engine, first, last):
    norms = []
    for step in range(first, last):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step)).to(next(engine.model.parameters()))
        engine.backward(engine.model(x).square().mean() * 100)
        norms.append(engine.step())
    return norms


def values(model, masters):
    return [*model.state_dict().values(), *(masters.state_dict().values() if masters is not None else ())]


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{"states": "host"}, {"in_backward": True}, {"states": "host", "in_backward": True}]
)
def test_numbers_are_those_of_the_plain_optimizer(cls, bf16, options):
    """To the last bit; a run also goes on from a checkpoint of the other kind."""
    plain, model, masters = engine_of(cls, bf16)
    engine, *own = engine_of(cls, bf16, **options)
    norms = [train(each, 0, 2) for each in (plain, engine)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    saved = [copy.deepcopy(each.state_dict()) for each in (plain, engine)]
    assert saved[0]["state"].keys() == saved[1]["state"].keys()
    for engine_options, state in ((options, saved[0]), ({}, saved[1])):
        again, *of_again = engine_of(cls, bf16, **engine_options)
        again.model.load_state_dict(model.state_dict())
        if masters is not None:
            of_again[1].load_state_dict(masters.state_dict())
        again.load_state_dict(state)
        train(again, 2, 4)
        own += of_again
    for each in (plain, engine):
        train(each, 2, 4)
    expected = values(model, masters)
    for pair in zip(own[::2], own[1::2]):
        assert all(torch.equal(a, b) for a, b in zip(values(*pair), expected, strict=True))


def run(config, name, *words):
    torch.manual_seed(0)  # of the tiny autoencoder's random weights
    folder = Trainer(parse_config([config, "--exp-name", name, *words], TrainOptions)).run()
    return folder, next(folder.glob("epoch*-global_step3"), None)


def test_a_run_is_the_plain_one_and_goes_on_exactly(tmp_path):
    """Weights, fp32 copies, averages and moments of checkpoints, with both options and killed after the first step."""
    kept = dict(save_master_weights=True, load_master_weights=True)
    config = str(tiny_run(tmp_path, dtype="bf16", grad_clip=0.0, **kept))
    both = ("--optim.states", "host", "--optim.in_backward", "True")
    _, plain = run(config, "plain")
    folder, _ = run(config, "parts", *both, "--max-steps", "1")
    _, parts = run(config, "parts", *both, "--load", str(folder))
    for name in ("model", "master", "ema"):
        found, expected = (load_weights(checkpoint, name) for checkpoint in (parts, plain))
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    moments = [load_part(checkpoint, "optimizer")["state"] for checkpoint in (parts, plain)]
    assert all(torch.equal(moments[0][i][key], x) for i, state in moments[1].items() for key, x in state.items())


def test_states_and_copies_wait_in_host_memory():
    engine, *_ = engine_of("AdamW", states="host")
    train(engine, 0, 2)
    optimizer = engine.optimizer
    of_one = 3 * 4 * WIDTH * WIDTH  # two moments and a copy of the largest parameter
    assert optimizer.shuttle.most <= 2 * of_one
    for parameter, state in optimizer.state.items():
        assert parameter.untyped_storage().nbytes() == 4  # stands for its copy
        assert all(state[key] is optimizer._held[parameter][key] for key in ("exp_avg", "exp_avg_sq"))


def test_gradients_are_freed_in_the_backward_pass():
    kept = []
    for in_backward in (False, True):
        engine, *_ = engine_of("AdamW", in_backward=in_backward)
        train(engine, 0, 1)
        x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
        with LiveBytes() as live:
            engine.backward(engine.model(x).square().mean())
            kept.append((live.now, live.peak))
    every = 4 * LAYERS * (WIDTH + 1) * WIDTH
    assert kept[0][0] >= every
    assert kept[1][0] < every / 50
    assert kept[1][1] < kept[0][1] - every / 4


def test_what_is_not_finite_updates_nothing():
    engine, model, _ = engine_of("AdamW", bf16=False, in_backward=True)
    before = copy.deepcopy(model.state_dict())
    engine.backward(model(torch.full((1, WIDTH), torch.inf)).sum())
    assert not torch.isfinite(torch.tensor(engine.step()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.blocks[2].bias.register_hook(lambda grad: grad * torch.nan)
    engine.backward(model(torch.randn(2, WIDTH)).square().mean())
    assert not torch.isfinite(torch.tensor(engine.step()))
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [key for key in before if key != "blocks.2.bias"]


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"grad_clip": 1.0}, 1, "grad_clip=0, not 1.0"),
        ({"accumulation_steps": 2}, 1, "accumulation_steps=1, not 2"),
        ({"plugin": "fsdp2"}, 2, "one process"),
    ],
)
def test_what_needs_all_gradients_is_refused(options, ranks, message):
    with pytest.raises(UserError, match=f"optim.in_backward=True needs {message}"):
        check_optimizer(LoopOptions(optim=OptimOptions(in_backward=True), **options), ranks)


@pytest.mark.parametrize(
    ("plugin", "cls", "tp", "message"),
    [
        ("zero2", "AdamW", 1, "plugin zero2"),
        ("ddp", "AdamW", 2, "plugin ddp and tp_size=2"),
        ("fsdp2", "Muon", 1, "plugin fsdp2 and Muon"),
    ],
)
def test_where_states_cannot_wait_in_host_memory(plugin, cls, tp, message):
    config = PluginOptions(tp_size=tp)
    cfg = LoopOptions(optim=OptimOptions(states="host", cls=cls), plugin=plugin, plugin_config=config)
    with pytest.raises(UserError, match=f"optim.states=host with {message}"):
        check_optimizer(cfg, 2)
