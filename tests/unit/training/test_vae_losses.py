"""LPIPS, the discriminator and the losses of autoencoder training beside independent float64 computations."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opensora.config.options import LpipsOptions, VaeLossOptions
from opensora.models.vae.config import DiscriminatorConfig
from opensora.models.vae.discriminator import NLayerDiscriminator3D
from opensora.models.vae.losses import VAELoss, adaptive_weight, discriminator_loss, gradient_penalty
from opensora.models.vae.lpips import CONVOLUTIONS, LPIPS, build_lpips, check_lpips
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError

SMALL = (4, 6, 8, 8, 5)


def random_lpips(widths=SMALL, dtype=torch.float64):
    torch.manual_seed(3)
    model = LPIPS(widths).to(dtype)
    for key, value in model.state_dict().items():
        value.copy_(torch.randn_like(value).abs() if key.startswith("lin") else torch.randn_like(value) * 0.3)
    return model


def convolve(image, weight, bias):
    """3x3 convolution with zero padding of one image [C, H, W], in numpy."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]


def reference_distance(state, first, second):
    """LPIPS from its paper, image by image: numpy and float64 only."""

    def unit_features(image):
        x = (image - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        index, found = 0, []
        for stage, count in enumerate(CONVOLUTIONS):
            if stage:
                c, h, w = x.shape
                x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
                index += 1  # the pooling has a number too
            for _ in range(count):
                x = np.maximum(convolve(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"]), 0)
                index += 2  # so has the ReLU
            found.append(x / (np.sqrt((x**2).sum(axis=0, keepdims=True)) + 1e-10))
        return found

    pairs = zip(unit_features(first), unit_features(second))
    weights = [state[f"lin{k}.model.1.weight"][0, :, 0, 0] for k in range(5)]
    return sum(np.einsum("chw,c->hw", (a - b) ** 2, w).mean() for (a, b), w in zip(pairs, weights))


def test_lpips_equals_a_float64_computation():
    model = random_lpips()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    first, second = torch.rand(2, 2, 3, 34, 20, dtype=torch.float64) * 2 - 1
    expected = [reference_distance(state, a.numpy(), b.numpy()) for a, b in zip(first, second)]
    assert model(first, second).tolist() == pytest.approx(expected, abs=1e-12)
    assert model.float()(first.float(), second.float()).tolist() == pytest.approx(expected, rel=1e-4)
    assert model.double()(first, first).abs().max() == 0
    with pytest.raises(UserError, match="16x16"):
        model(first[..., :8], second[..., :8])


def test_lpips_gradient_is_finite_and_the_same_when_recomputed():
    first = torch.zeros(1, 3, 16, 16, dtype=torch.float64)  # some features are all zero here
    gradients = []
    for again in (False, True):
        model = random_lpips()
        model.grad_checkpoint = again
        second = torch.linspace(-1, 1, 768, dtype=torch.float64).reshape(first.shape).requires_grad_()
        model(first, second).sum().backward()
        gradients.append(second.grad)
    assert torch.equal(*gradients)
    assert gradients[0].isfinite().all()
    assert gradients[0].abs().max() > 0
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.train().training


def test_lpips_reads_the_released_layouts(tmp_path, monkeypatch):
    monkeypatch.setattr("opensora.models.vae.lpips.LPIPS.__init__.__defaults__", (SMALL, False))
    model = random_lpips(dtype=torch.float32)
    state = model.state_dict()
    assert "features.28.weight" in state
    assert set(state) - {k for k in state if k.startswith("features.")} == {f"lin{k}.model.1.weight" for k in range(5)}
    backbone = {k: v for k, v in state.items() if k.startswith("features.")} | {"classifier.0.weight": torch.zeros(2)}
    torch.save(backbone, tmp_path / "vgg16.pth")
    save_file({k: v for k, v in state.items() if k.startswith("lin")}, tmp_path / "vgg.safetensors")
    source = LpipsOptions(heads=str(tmp_path / "vgg.safetensors"), backbone=str(tmp_path / "vgg16.pth"))
    check_lpips(source)
    loaded = build_lpips(source)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(UserError, match="missing in the file"):
        check_lpips(LpipsOptions(heads=str(tmp_path / "vgg.safetensors"), backbone=str(tmp_path / "vgg.safetensors")))
    with pytest.raises(UserError, match=r"(?s)lpips\.backbone.*curl"):
        check_lpips(LpipsOptions(heads=str(tmp_path / "vgg.safetensors"), backbone=str(tmp_path / "no.pth")))


def test_lpips_without_weights_must_be_asked_for():
    with pytest.raises(UserError, match=r"lpips\.heads is not set"):
        build_lpips(None)
    with pytest.raises(UserError, match=r"lpips\.backbone is not set"):
        build_lpips(LpipsOptions(heads="a.pth"))
    with pytest.raises(UserError, match="exclude"):
        check_lpips(LpipsOptions(heads="a.pth", random=True))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b = build_lpips(LpipsOptions(random=True)), build_lpips(LpipsOptions(random=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert sum(p.numel() for p in a.features.parameters()) == 14_714_688  # VGG16 without its classifier
    first, second = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    assert 0.01 < float(a(first, second)) < 10


def test_perceptual_term_counts_once_per_value():
    torch.manual_seed(0)
    video, other = torch.rand(2, 2, 3, 5, 16, 16) * 2 - 1
    lpips = random_lpips(dtype=torch.float32)
    plain, _ = VAELoss()(video, other, None)
    terms = VAELoss(VaeLossOptions(perceptual_loss_weight=0.5, logvar_init=0.3), lpips).terms(video, other, None)
    frames = [(video[b, :, t], other[b, :, t]) for b in range(2) for t in range(5)]
    distances = [float(lpips(a[None], b[None])) for a, b in frames]
    values = 3 * 16 * 16
    expected = (float(plain) + 0.5 * np.mean(distances) * values) * np.exp(-0.3) + 0.3 * values
    assert float(terms.nll) == pytest.approx(expected, rel=1e-5)
    assert float(terms.parts["perceptual"]) == pytest.approx(np.mean(distances), rel=1e-5)
    assert float(terms.kl) == 0


def test_discriminator_has_the_original_sizes_and_names():
    cfg = dict(type="N_Layer_discriminator_3D", input_nc=3, n_layers=5, conv_cls="conv3d")
    with torch.device("meta"):
        model = build_module(cfg, MODELS, device_map="meta")
        assert model(torch.empty(2, 3, 32, 256, 256)).shape == (2, 1, 8, 8, 8)
    assert sum(p.numel() for p in model.parameters()) == 18_823_553
    assert model.patches(32, 256, 256) == 8**3
    assert {"main.0.weight", "main.0.bias", "main.2.weight", "main.3.running_mean", "main.22.bias"} <= set(
        model.state_dict()
    )
    small = NLayerDiscriminator3D(DiscriminatorConfig(ndf=2, n_layers=2))
    for frames in (1, 2, 5, 9):
        assert small(torch.randn(2, 3, frames, 16, 8)).shape[2:].numel() == small.patches(frames, 16, 8)
    for wrong, message in ((dict(conv_cls="conv2d"), "conv_cls"), (dict(n_layers=0), "n_layers")):
        with pytest.raises(UserError, match=message):
            build_module({**cfg, **wrong}, MODELS)


def test_discriminator_losses_equal_their_formulas():
    real, fake = np.array([2.0, 0.25, -1.0]), np.array([-2.0, 0.5, 0.0])
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    expected = {
        "hinge": 0.5 * (np.mean([0, 0.75, 2]) + np.mean([0, 1.5, 1])),
        "vanilla": 0.5 * (softplus(-real).mean() + softplus(fake).mean()),
        "wgan-gp": fake.mean() - real.mean(),
    }
    for kind, value in expected.items():
        found = discriminator_loss(kind, torch.from_numpy(real), torch.from_numpy(fake))
        assert float(found) == pytest.approx(value, abs=1e-6), kind
    with pytest.raises(UserError, match="hinge"):
        discriminator_loss("wgan", torch.zeros(1), torch.zeros(1))


def test_gradient_penalty_of_a_linear_discriminator():
    weight = torch.tensor([1.0, 2.0, 2.0]).reshape(1, 3, 1, 1, 1)  # gradient of length 3 on every clip
    real, fake = torch.randn(2, 4, 3, 1, 1, 1)
    penalty = gradient_penalty(lambda x: (x * weight).flatten(1).sum(1), real, fake, torch.Generator())
    assert float(penalty) == pytest.approx(10 * (3 - 1) ** 2)


def test_adaptive_weight_is_the_ratio_of_gradients():
    last = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    nll, adversarial = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 0.5])).sum()
    weight = adaptive_weight(nll, adversarial, last)
    assert float(weight) == pytest.approx(5.0 / (0.5 + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    assert float(adaptive_weight(nll * 1e9, adversarial, last)) == 1e4
