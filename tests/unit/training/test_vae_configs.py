"""The shipped configs of autoencoders: they hold what Open-Sora 2.0's hold, and fit together."""

import os
from pathlib import Path

import pytest
import torch

from opensora.benchmark.measuring import in_own_process, tensor_bytes
from opensora.config import load_config
from opensora.config.commands import VaeInferenceOptions, VaeTrainOptions
from opensora.config.keys import read_section
from opensora.config.registries import MODELS
from opensora.models.build import build_on_meta, check_weights
from opensora.training.vae.checks import check_adversarial, check_config, check_lengths
from opensora.utils.errors import UserError
from tools.benchmark import models, vae
from tools.benchmark.vae import AUTOENCODERS, VAE_SIZES, VaeSizes, frames_for

ROOT = Path(__file__).parents[3] / "configs" / "vae"
TRAIN, INFERENCE = (sorted(path.name for path in (ROOT / kind).glob("*.py")) for kind in ("train", "inference"))


def load(kind, name):
    return load_config(ROOT / kind / name, VaeTrainOptions if kind == "train" else VaeInferenceOptions)


@pytest.mark.parametrize(("kind", "name"), [("train", n) for n in TRAIN] + [("inference", n) for n in INFERENCE])
def test_lengths_fit_the_autoencoder(kind, name):
    cfg = load(kind, name)
    model = build_on_meta(cfg.model)
    check_lengths(cfg.bucket_config, model)
    assert cfg.dataset.type == "video_text"


def test_training_of_the_video_dc_ae_is_the_original_one():
    plain, adversarial = load("train", "video_dc_ae.py"), load("train", "video_dc_ae_disc.py")
    for cfg in (plain, adversarial):
        assert cfg.bucket_config == {"256px_ar1:1": {32: (1.0, 1)}}
        assert (cfg.optim.lr, cfg.optim.eps, cfg.optim.betas) == (5e-5, 1e-8, (0.9, 0.98))
        assert (cfg.mixed_strategy, cfg.mixed_image_ratio, cfg.ema_decay) == ("mixed_video_image", 0.2, 0.99)
        assert (cfg.vae_loss_config.perceptual_loss_weight, cfg.vae_loss_config.kl_loss_weight) == (0.5, 0)
        assert cfg.pin_memory_cache_pre_alloc_numels == [50 * 1024**2] * 24
    assert plain.discriminator is None
    assert not plain.grad_checkpoint
    assert adversarial.grad_checkpoint
    assert adversarial.model.disc_off_grad_ckpt
    assert adversarial.model.from_scratch
    assert check_adversarial(adversarial, []).generator.disc_weight == 0.05
    with pytest.raises(UserError, match=r"lpips\.(backbone|heads): No weights at ./ckpts/lpips"):
        check_config(plain)


@pytest.mark.parametrize("name", [name for name in TRAIN if name.startswith("demo")])
def test_demo_trainings_pass_all_checks(name, monkeypatch):
    monkeypatch.chdir(ROOT.parents[1])
    plan = check_config(load("train", name))
    assert plan.multiple == (32 if name == "demo_dc_ae_f32.py" else 16)
    assert (plan.adversarial is not None) == (name == "demo_disc.py")


@pytest.mark.parametrize("name", ["demo_dc_ae.py", "demo_dc_ae_f32.py"])
def test_demo_dc_ae_is_measured_as_it_was_trained(name):
    train, inference = load("train", name).model, load("inference", name).model
    assert all(getattr(train, key) == getattr(inference, key) for key in ("latent_channels", "encoder", "decoder"))


@pytest.mark.parametrize("name", ["demo.py", "demo_image.py", "demo_dc_ae_f32.py"])
def test_weights_that_ship_are_of_the_layout_that_is_measured(name, monkeypatch):
    monkeypatch.chdir(ROOT.parents[1])
    section = load("inference", name).model
    assert section.from_pretrained.startswith("assets/demo/")
    check_weights("model", section)


def test_benchmark_lengths():
    causal, deep = (build_on_meta(read_section(section, MODELS)) for section in AUTOENCODERS.values())
    assert [frames_for(causal, n) for n in (33, 36)] == [33, 33]
    assert [frames_for(deep, n) for n in (33, 36)] == [32, 36]
    with pytest.raises(UserError, match="at least 9"):
        frames_for(deep, 7)


@pytest.mark.parametrize("kind", list(VAE_SIZES))
@pytest.mark.parametrize("name", list(AUTOENCODERS))
def test_benchmark_sizes_fit_the_autoencoders(kind, name):
    changes = VAE_SIZES[kind].changes
    assert set(changes) <= set(AUTOENCODERS)
    model = build_on_meta(read_section({**AUTOENCODERS[name], **changes.get(name, {})}, MODELS))
    assert frames_for(model, VAE_SIZES[kind].frames) > 0


def test_benchmark_measures_every_case_in_a_process_of_its_own(monkeypatch):
    here = torch.get_num_threads()
    assert in_own_process(torch.get_num_threads) == here
    assert in_own_process(os.getpid) != os.getpid()
    tiny = {"width_list": [32] * 6, "depth_list": [1] * 6}
    changes = {"video DC-AE 4x32x32": {"latent_channels": 32, "encoder": tiny, "decoder": tiny}}
    sizes = VaeSizes(torch.float32, (32,), 9, changes)
    started = []
    monkeypatch.setattr(vae, "in_own_process", lambda function, *args: started.append(args) or function(*args))
    monkeypatch.setattr(vae, "AUTOENCODERS", {name: AUTOENCODERS[name] for name in changes})
    rows = list(vae.autoencoder_rows(torch.device("cpu"), sizes, 1))
    assert len(rows) == len(started) == 4
    what = [f"{direction}, 8x32x32, {how}" for how in ("tiles", "whole") for direction in ("encode", "decode")]
    assert [row["case"] for row in rows] == [f"video DC-AE 4x32x32, {words}" for words in what]
    assert all(row["frames_per_s"] > 0 for row in rows)


def test_benchmark_of_autoencoders_needs_no_diffusers(monkeypatch, capsys):
    monkeypatch.setattr(models, "diffusers_module", None)
    monkeypatch.setattr(models, "autoencoder_rows", lambda *_: [{"case": "one", "median_s": 2.0}])
    models.main(["--vae"])
    assert "| one | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--size", "100"], ["--frames", "8"]])
def test_benchmark_refuses_clips_that_do_not_fit(words):
    with pytest.raises(UserError, match=" ".join(words)):
        models.main(["--vae", *words])


def test_tensor_bytes_are_those_alive_together():
    x = torch.zeros(1 << 20)
    # two of 4 MiB at a time, though three are made
    assert tensor_bytes(lambda: ((x + 1) * 2) - 3) == pytest.approx(2 * x.nbytes, rel=1e-3)
