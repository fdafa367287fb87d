"""What is trained: fp32 master weights, frozen parts, adapters, and the average of them."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opensora.acceleration.engine import SingleEngine
from opensora.config.options import OptimOptions
from opensora.training.weights.adapters import LoraAdapter, TrainedWeights, freeze, read_adapter
from opensora.training.weights.ema import EMA
from opensora.training.weights.masters import MasterWeights
from opensora.training.weights.optimizer import create_optimizer
from opensora.utils.errors import UserError


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2)).to(dtype)


def train(model, masters, steps, accumulation=2, lr=1e-4):
    """A few steps on fixed data; returns the engine."""
    named = masters.named_parameters() if masters else model.named_parameters()
    optimizer = create_optimizer(named, OptimOptions(lr=lr))
    if masters:
        masters.attach(optimizer)
    engine = SingleEngine(model, optimizer, max_norm=1.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(accumulation):
            x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
            engine.backward((model(x).float() - x[:, :2].float()).square().mean() / accumulation)
        engine.step()
    return engine


def test_bf16_with_masters_follows_fp32():
    start = net(torch.bfloat16)
    exact, plain, mixed = net(), net(torch.bfloat16), net(torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in start.state_dict().items()})
    masters = MasterWeights(mixed)
    train(exact, None, 40)
    train(plain, None, 40)
    train(mixed, masters, 40)

    def distance(state):
        return sum((v.float() - exact.state_dict()[k]).abs().mean() for k, v in state.items())

    # Without masters, updates of 1e-4 are mostly rounded away.
    assert distance(masters.state_dict()) < 0.1 * distance(plain.state_dict())
    assert all(torch.equal(p, masters.state_dict()[k].bfloat16()) for k, p in mixed.state_dict().items())
    assert all(p.grad is None for p in mixed.parameters())


def test_masters_go_on_exactly():
    whole, part = net(torch.bfloat16), net(torch.bfloat16)
    train(whole, MasterWeights(whole), 3)
    masters = MasterWeights(part)
    saved = {k: v.clone() for k, v in masters.state_dict().items()}
    train(part, masters, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters()))
    masters.load_state_dict(saved)
    assert all(torch.equal(p, q) for p, q in zip(part.parameters(), net(torch.bfloat16).parameters()))


def test_fp32_parameters_need_no_copy():
    model = net()
    assert [p is q for (_, p), q in zip(MasterWeights(model).named_parameters(), model.parameters())] == [True] * 4


def test_frozen_parts_stay():
    model = net()
    assert freeze(model, "0, 2.bias") == ["0.bias", "0.weight", "2.bias"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, None, 2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"2.weight"}
    with pytest.raises(UserError, match="'3' fits no parameter; the model's parts are 0, 1, 2"):
        freeze(model, ["3"])


def test_adapters_train_and_come_back(tmp_path):
    config = dict(r=2, lora_alpha=4, target_modules=["0", "2"])
    model = net()
    adapter = LoraAdapter(model, config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, None, 2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_" in key for key in changed)
    twin = net()
    other = LoraAdapter(twin, config)
    other.load(adapter.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))
    assert not torch.equal(model(x), net()(x))
    with pytest.raises(UserError, match="does not fit lora_config"):
        LoraAdapter(net(), {**config, "r": 3}).load(adapter.state_dict())
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_trainer_to_start_from(tmp_path):
    config = dict(r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    whole = net()
    adapter = LoraAdapter(whole, config)
    state = {}
    for key, value in adapter.state_dict().items():
        module, kind = key.removeprefix("base_model.model.").split(".", 1)
        name = "lora_down" if "lora_A" in kind else "lora_up"
        state[f"lora_unet_{module}.{name}.weight"] = value * (0.25 if name == "lora_up" else 1)
        state[f"lora_unet_{module}.alpha"] = torch.tensor(24.0)
    file = tmp_path / "style.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    model = net()
    LoraAdapter(model, config, file)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), whole(x))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2))
    with pytest.raises(UserError, match="does not fit lora_config"):
        LoraAdapter(empty, {**config, "r": 3}, file)


def test_the_average_is_shown_for_a_while():
    model = net(torch.bfloat16)
    weights = TrainedWeights(model, MasterWeights(model))
    ema = EMA(weights, 0.5)
    assert all(v.dtype == torch.float32 for v in ema.shadow.values())
    for value in ema.shadow.values():
        value.add_(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with ema.shown(weights):
        assert torch.equal(model[0].weight, ema.shadow["0.weight"].bfloat16())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
