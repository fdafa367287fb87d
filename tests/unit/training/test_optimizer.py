"""Optimizers and their schedule."""

import copy

import pytest
import torch
from torch import nn

from opensora.config.options import OptimOptions
from opensora.training.weights.optimizer import check_same_optimizer, create_optimizer, create_schedule
from opensora.utils.errors import UserError


def rates(steps, **options):
    optimizer = create_optimizer([("w", nn.Parameter(torch.zeros(1)))], OptimOptions(lr=1.0))
    schedule = create_schedule(optimizer, **options)
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
