"""Optimizers and their schedule."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from opensora.config.commands import LoopOptions
from opensora.config.options import OptimOptions, PluginOptions, SchedulerOptions
from opensora.training.checks import check_optimizer
from opensora.training.weights.groups import base_lr, check_groups
from opensora.training.weights.optimizer import check_same_optimizer, create_optimizer, create_schedule
from opensora.utils.errors import UserError


def rates(steps, **options):
    optimizer = create_optimizer([("w", nn.Parameter(torch.zeros(1)))], OptimOptions(lr=1.0))
    given = {key: options.pop(key) for key in ("total_steps", "start_step") if key in options}
    schedule = create_schedule(optimizer, SchedulerOptions(**options), **given)
    out = []
    for _ in range(steps):
        out.append(schedule.get_last_lr()[0])
        schedule.step()  # the optimizer has not moved, as when a step is skipped: that counts, and nothing warns
    return out


@pytest.mark.filterwarnings("error")
def test_schedule_warms_up_stays_and_decays():
    values = rates(20, warmup_steps=4, total_steps=20, cosine=True, flat_share=0.5)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-5)
    assert values[5:13] == [1.0] * 8
    assert values[16] == pytest.approx(0.5)
    assert rates(20, warmup_steps=4, total_steps=20, cosine=True, flat_share=0.5, start_step=16)[0] == values[16]
    assert rates(3) == [1.0] * 3


def test_schedules_by_name():
    flat = dict(warmup_steps=10, total_steps=110)
    assert rates(110, name="cosine", flat_share=0.5, **flat) == rates(110, cosine=True, flat_share=0.5, **flat)
    assert rates(110, name="constant", cosine=True, **flat)[10:] == [1.0] * 100
    line = rates(110, name="linear", flat_share=0.5, final_share=0.1, **flat)
    assert line[10:61] == [1.0] * 51
    assert line[85] == pytest.approx(1 - 0.9 / 2)  # half of the way from 1 to a tenth
    assert line[109] == pytest.approx(0.1 + 0.9 / 50)
    stable = rates(110, name="wsd", decay_share=0.25, flat_share=0.9, **flat)  # flat_share is not for wsd
    assert stable[10:86] == [1.0] * 76
    assert stable[86] == pytest.approx(1 - (1 / 25) ** 0.5)
    assert stable[105] == pytest.approx(1 - (20 / 25) ** 0.5)
    assert rates(5, name="wsd", start_step=105, decay_share=0.25, **flat)[0] == stable[105]
    longer = rates(86, name="wsd", decay_share=0.25, warmup_steps=10, total_steps=1000)
    assert longer == stable[:86]  # the plateau does not know the end
    with pytest.raises(UserError, match="wsd needs the length of the run"):
        rates(1, name="wsd")


GROUPS = {"*.bias": {"weight_decay": 0.0}, "blocks.0": {"lr": 3e-2, "weight_decay": 0.5}}


@pytest.mark.parametrize("cls", ["AdamW", "Muon"])
def test_groups_train_with_settings_of_their_own(cls):
    """As optimizers apart would: one for each learning rate and decay."""
    ours, plain = Net(), Net()
    base = dict(lr=1e-2, weight_decay=0.1)
    updates(ours, [create_optimizer(ours.named_parameters(), OptimOptions(cls=cls, groups=GROUPS, **base))])
    parts: dict[tuple[float, float], list] = {}
    for name, p in plain.named_parameters():
        rate, decay = (1e-2, 0.0) if name.endswith("bias") else (3e-2, 0.5) if "blocks" in name else (1e-2, 0.1)
        parts.setdefault((rate, decay), []).append((name, p))
    optimizers = [
        create_optimizer(named, OptimOptions(cls=cls, lr=rate, weight_decay=decay))
        for (rate, decay), named in parts.items()
    ]
    assert len(optimizers) == 3
    updates(plain, optimizers)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_follow_one_schedule_and_the_config_when_resumed():
    model = Net()
    optim = OptimOptions(cls="AdamW", lr=1e-2, groups=GROUPS)
    optimizer = create_optimizer(model.named_parameters(), optim)
    schedule = create_schedule(optimizer, SchedulerOptions(name="linear"), total_steps=4)
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.75e-2, 0.75e-2, 2.25e-2])
    updates(model, [optimizer], steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    again = create_optimizer(model.named_parameters(), optim)
    again.load_state_dict(saved)
    assert [base_lr(group, optim) for group in again.param_groups] == [1e-2, 1e-2, 3e-2]
    other = OptimOptions(cls="AdamW", lr=1e-3, groups={**GROUPS, "blocks.0": {"lr": 5e-2}})
    assert [base_lr(group, other) for group in again.param_groups] == [1e-3, 1e-3, 5e-2]
    plain = create_optimizer(model.named_parameters(), OptimOptions(cls="AdamW", lr=1e-2))
    with pytest.raises(UserError, match=r"groups of \[2, 3, 1\] parameters, now \[6\].*optim.groups"):
        check_same_optimizer(saved, plain, "--load x")


def test_groups_name_their_mistakes():
    named = [*Net().named_parameters()]
    for groups, message in (
        ({"block": {"lr": 1.0}}, "optim.groups: 'block' fits no parameter that trains; .* first, last, blocks"),
        ({"*": {"lr": 1.0}, "last": {"lr": 2.0}}, "patterns before 'last' take all"),
        ({"last": {"lr": -1.0}}, "lr=-1.0: must be at least 0"),
        ({"last": {"beta": 1.0}}, "beta is not a known key"),
        ({"last": {}}, "give lr, weight_decay or both"),
    ):
        with pytest.raises(UserError, match=message):
            check_groups(named, OptimOptions(groups=groups))


def test_optimizer_names_its_mistakes():
    with pytest.raises(UserError, match="optim.cls='SGD'"):
        create_optimizer([("w", nn.Parameter(torch.zeros(1)))], OptimOptions(cls="SGD"))
    with pytest.raises(UserError, match=r"optim\.momentum"):
        create_optimizer([("w", nn.Parameter(torch.zeros(1)))], OptimOptions(momentum=0.9))


class Net(nn.Module):
    """A first layer, one block, a last layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return self.last(self.blocks[0](self.first(x)).relu())


def updates(model, optimizers, steps=3):
    for step in range(steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    ours, plain = Net(), Net()
    config = OptimOptions(cls="Muon", lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    updates(ours, [create_optimizer(ours.named_parameters(), config)])
    matrix = plain.blocks[0].weight
    rest = [p for p in plain.parameters() if p is not matrix]
    muon = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    updates(plain, [muon, torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)])
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="adamw_mode"):
        create_optimizer(ours.named_parameters(), OptimOptions(cls="Muon", adamw_mode=False))


def test_muon_resumes_and_follows_the_schedule():
    config = OptimOptions(cls="Muon", lr=1e-2)
    model = Net()
    optimizer = create_optimizer(model.named_parameters(), config)
    updates(model, [optimizer])
    again = Net()
    again.load_state_dict(model.state_dict())
    resumed = create_optimizer(again.named_parameters(), config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (again, resumed)):
        for group in opt.param_groups:
            group["lr"] = 3e-3
        updates(net, [opt], steps=2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    frozen = [p.detach().clone() for p in again.parameters()]
    for group in resumed.param_groups:
        group["lr"] = 0.0
    updates(again, [resumed])
    for a, b in zip(again.parameters(), frozen, strict=True):
        assert torch.equal(a, b)


def test_another_optimizer_cannot_go_on():
    model = nn.Sequential(nn.Linear(2, 2))
    muon, adam = (create_optimizer(model.named_parameters(), OptimOptions(cls=cls)) for cls in ("Muon", "AdamW"))
    check_same_optimizer(adam.state_dict(), adam, "--load x")
    for saved, other in ((muon, adam), (adam, muon)):
        with pytest.raises(UserError, match="--load x: its optimizer .* optim.cls"):
            check_same_optimizer(saved.state_dict(), other, "--load x")


def descend(cls, steps, resume_at=None):
    """Loss after every step of fitting a matrix of 64 x 128, and the matrix; at ``resume_at`` the optimizer is one that
    was made anew from the state of the first."""
    generator = torch.Generator().manual_seed(0)
    wanted, bias = torch.randn(64, 128, generator=generator), torch.randn(64, generator=generator)
    weight, small = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(64))
    named = [("weight", weight), ("small", small)]
    config = OptimOptions(cls=cls, lr=3e-2, weight_decay=0.01)
    optimizer, losses = create_optimizer(named, config), []
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = create_optimizer(named, config)
            optimizer.load_state_dict(saved)
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(step))
        loss = (x @ (weight - wanted).t() + small - bias).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, weight.detach(), optimizer


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adamw_in_8_bits_follows_adamw_and_resumes_exactly():
    (exact, _, adam), (losses, weight, optimizer) = (descend(cls, 40) for cls in ("AdamW", "AdamW8bit"))
    assert losses[-1] < 0.2 * losses[0]
    # of the moments' 8 bits, an update is off by a few percent at random, which the course of the loss averages out
    assert losses == pytest.approx(exact, rel=0.03)
    moments = [tensor for tensor in optimizer.state[optimizer.param_groups[0]["params"][0]].values()
               if isinstance(tensor, torch.Tensor) and tensor.numel() == weight.numel()]  # fmt: skip
    assert [tensor.dtype for tensor in moments] == [torch.uint8, torch.uint8]
    assert torch.equal(descend("AdamW8bit", 40, resume_at=17)[1], weight)
    for saved, other in ((adam, optimizer), (optimizer, adam)):
        with pytest.raises(UserError, match="its optimizer is (not )?AdamW8bit; set optim.cls"):
            check_same_optimizer(saved.state_dict(), other, "--load x")
    with pytest.raises(UserError, match="adamw_mode"):
        create_optimizer([], OptimOptions(cls="AdamW8bit", adamw_mode=False))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=r"optim\.cls=AdamW8bit needs the module bitsandbytes.*pip install"):
        check_optimizer(LoopOptions(optim=OptimOptions(cls="AdamW8bit")), 1)


@pytest.mark.parametrize("cls", ["Muon", "AdamW8bit"])
def test_whole_rows_are_asked_for(cls):
    for plugin, sizes in (("zero2", {}), ("ddp", {"tp_size": 2}), ("fsdp2", {"tp_size": 2})):
        cfg = LoopOptions(optim=OptimOptions(cls=cls), plugin=plugin, plugin_config=PluginOptions(**sizes))
        with pytest.raises(UserError, match=f"optim.cls={cls} needs whole rows of every matrix: use --plugin fsdp2"):
            check_optimizer(cfg, 2)
        check_optimizer(cfg, 1)
    for plugin in ("ddp", "fsdp2"):
        check_optimizer(LoopOptions(optim=OptimOptions(cls=cls), plugin=plugin), 2)
