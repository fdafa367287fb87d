"""Optimizer schedule, averaged weights, checkpoints, losses."""

import copy
import math

import pytest
import torch
from torch import nn

from opensora.config.options import OptimOptions, VaeLossOptions
from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.vae.losses import VAELoss, object_mask
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.checkpoint.folder import (
    RunningStates,
    find_checkpoint,
    list_checkpoints,
    load_states,
    load_weights,
    remove_old_checkpoints,
)
from opensora.training.checkpoint.writer import CheckpointWriter
from opensora.training.experiment import experiment_name
from opensora.training.loop import step_generator
from opensora.training.weights.ema import EMA
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


def test_ema_is_float32_and_equals_the_formula():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().double()
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(0.01)
        ema.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert ema.shadow["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.shadow["weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_another_optimizer_cannot_go_on():
    model = nn.Sequential(nn.Linear(2, 2))
    muon, adam = (create_optimizer(model.named_parameters(), OptimOptions(cls=cls)) for cls in ("Muon", "AdamW"))
    check_same_optimizer(adam.state_dict(), adam, "--load x")
    for saved, other in ((muon, adam), (adam, muon)):
        with pytest.raises(UserError, match="--load x: its optimizer .* optim.cls"):
            check_same_optimizer(saved.state_dict(), other, "--load x")


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    weights, writer = {"w": torch.arange(3.0)}, CheckpointWriter(tmp_path)
    for step in (1, 2, 10):
        writer.save(CheckpointContent(RunningStates(0, step, step, step), weights, {"optimizer": {"a": 1}}))
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"epoch0-global_step{s}" for s in (1, 2, 10)]
    remove_old_checkpoints(tmp_path, 2)
    assert len(list_checkpoints(tmp_path)) == 2
    newest = find_checkpoint(str(tmp_path), tmp_path.parent)
    assert load_states(newest).global_step == 10
    assert torch.equal(load_weights(newest)["w"], weights["w"])

    def full_disk(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="no space"):
        writer.save(CheckpointContent(RunningStates(0, 11, 11, 11), weights, {"optimizer": {}}), last=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch0-global_step10", "epoch0-global_step2"]
    with pytest.raises(UserError, match="neither a checkpoint"):
        find_checkpoint(str(tmp_path / "none"), tmp_path)


def test_step_generator_depends_on_step_and_rank_only():
    def draw(*args):
        return torch.rand(4, generator=step_generator(*args)).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({tuple(draw(*args)) for args in [(1, 5, 0), (1, 6, 0), (1, 5, 1), (2, 5, 0)]}) == 4


def test_vae_loss_equals_a_float64_computation():
    torch.manual_seed(0)
    video, other = torch.rand(2, 3, 5, 8, 8) * 0.05, torch.rand(2, 3, 5, 8, 8)
    video[:, :, :, 2:4, 2:4] += 0.7
    posterior = DiagonalGaussian(torch.randn(2, 8, 2, 1, 1))
    total, parts = VAELoss(VaeLossOptions(kl_loss_weight=0.1, mse_loss_weight=2.0, object_weight=3.0))(
        video, other, posterior
    )
    x, y = video.double(), other.double()
    weight = torch.ones(2, 1, 5, 8, 8, dtype=torch.float64)
    weight[:, :, :, 2:4, 2:4] += 3.0
    error = ((x - y).abs() + 2 * (x - y) ** 2) * weight
    expected = error.sum() / 10 + 0.1 * posterior.kl().double().mean()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    mse = ((x - y) ** 2).mean(dim=(1, 2, 3, 4))
    assert float(parts["psnr"]) == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), rel=1e-5)
    assert object_mask(video).sum() == 2 * 5 * 4
    with pytest.raises(UserError, match="perceptual"):
        VAELoss(VaeLossOptions(perceptual_loss_weight=0.5))


def test_inflation_keeps_single_frames_exactly():
    config = HunyuanVAEConfig(latent_channels=4, layers_per_block=1, norm_num_groups=2, block_out_channels=(4, 4, 8, 8))
    model = AutoencoderKLCausal3D(config).double()
    image = torch.randn(1, 3, 1, 16, 16, dtype=torch.float64)
    before = model(image, sample_posterior=False)[0]
    assert model.inflate_from_images()
    torch.testing.assert_close(model(image, sample_posterior=False)[0], before, atol=1e-10, rtol=1e-10)
    kernel = model.encoder.conv_in.conv.weight
    assert kernel[:, :, :-1].abs().max() == 0


def test_experiment_name_drops_what_is_not_the_configs():
    name = experiment_name("/somewhere/configs/diffusion/train/demo_cpu.py")
    assert name.split("-", 1)[1] == "diffusion_train_demo_cpu"
    assert math.isclose(len(name.split("-")[0]), 13)
