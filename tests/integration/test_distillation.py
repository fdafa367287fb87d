"""Distillation from a config to a video: several optimizers resumed, adapters on one base, and what a file tells."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from opensora.config import load_config, parse_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.diffusion import distilled
from opensora.diffusion.flow import shifted
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.trainer import Trainer
from opensora.utils.weights_writing import save_safetensors
from tests.helpers.cli import load_main

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["proj", "linear2", "qkv"]}
DMD = {
    "training_method": "dmd",
    "training_method_config": {
        "num_steps": 2,
        "guidance": 2.0,
        "fake_updates": 2,
        "fake_optim": {"cls": "AdamW", "lr": 1e-3},
    },
}


@pytest.fixture
def content(diffusion_content, tiny_config, tmp_path):
    """Content of a training config that starts from weights."""
    torch.manual_seed(0)
    models = {}
    for name in ("model", "ae"):
        path = tmp_path / f"{name}.safetensors"
        module = build_module(tiny_config[name], MODELS)
        save_safetensors(
            {key: value + 0.02 * torch.randn_like(value) for key, value in module.state_dict().items()}, path
        )
        models[name] = {**tiny_config[name], "from_pretrained": str(path)}
    return {**diffusion_content, **models, "condition_config": {"t2v": 1, "i2v_head": 1}}


def train(config, *words):
    return Trainer(parse_config([config, *map(str, words)], TrainOptions)).run()


def checkpoint(folder, step):
    return next(folder.glob(f"epoch*-global_step{step}"))


def weights(folder, step, files):
    found = checkpoint(folder, step)
    return {(file, key): value for file in files for key, value in load_file(found / file).items()}


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_dmd_resumes_exactly(content, write_config, tmp_path, kind):
    more = {"lora_config": LORA} if kind == "lora" else {}
    config = write_config(tmp_path / "dmd.py", {**content, **DMD, **more})
    own = "lora/adapter_model.safetensors" if kind == "lora" else "model/model.safetensors"
    files = (own, "fake/model.safetensors")
    whole = train(config, "--exp-name", "whole")
    parts = whole.with_name("parts")
    parts.mkdir()
    checkpoint(whole, 3).rename(parts / checkpoint(whole, 3).name)
    train(config, "--load", parts)
    a, b, start = weights(whole, 5, files), weights(parts, 5, files), weights(parts, 3, files)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    for file in files:  # both train
        assert not all(torch.equal(a[key], start[key]) for key in a if key[0] == file)
    if kind == "lora":
        assert all("lora_" in key for _, key in a)
    log = (whole / "log.txt").read_text()
    assert all(f"{name}=" in log for name in ("loss", "fake_loss", "fake_grad_norm", "score_difference"))


def test_adapters_on_one_base_are_as_models_of_their_own(content, write_config, tmp_path):
    """Before any update, teacher, fake score and student are one model; their losses are those of three models."""
    losses = {}
    for kind, more in (("weights", {}), ("lora", {"lora_config": LORA})):
        config = write_config(tmp_path / f"{kind}.py", {**content, **DMD, **more, "max_steps": 1})
        folder = train(config, "--exp-name", kind)
        line = next(line for line in (folder / "log.txt").read_text().splitlines() if "step 1/1" in line)
        losses[kind] = {part.split("=")[0]: float(part.split("=")[1]) for part in line.split() if "loss=" in part}
    assert losses["weights"] == pytest.approx(losses["lora"], rel=1e-3)  # as logged


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_a_checkpoint_says_how_it_is_sampled(content, tiny_config, write_config, tmp_path, kind):
    more = {"lora_config": LORA} if kind == "lora" else {}
    method = {
        "training_method": "trajectory_distillation",
        "training_method_config": {"positions": [1, 0.75, 0], "guidance": 3.0, "teacher_steps": 2},
    }
    folder = train(write_config(tmp_path / "train.py", {**content, **method, **more, "max_steps": 1}))
    found = checkpoint(folder, 1)
    base = {"model": content["model"], "ae": content["ae"]}
    if kind == "lora":
        flags = {"pretrained_lora_path": str(found / "lora") + "@0.8"}
    else:
        flags = {"model.from_pretrained": str(found / "model" / "model.safetensors")}
    cfg = load_config({**tiny_config, **base}, InferenceOptions, flags)
    run = PreparedRun.of(cfg, CPU)
    assert (run.plan.num_steps, run.plan.forwards, run.plan.solver) == (2, 2, "euler")
    assert run.plan.times == pytest.approx(shifted([1, 0.75, 0], 4, 3))
    (image,) = run.plans(["i2v_head"])
    assert (image.num_steps, image.forwards, image.has_image) == (2, 2, True)
    result = VideoPipeline.from_config(cfg)(
        "a thing", ref=np.zeros((32, 32, 3), dtype=np.uint8), cond_type="i2v_head", seed=1
    )
    assert result.plan.times == image.times
    again = PreparedRun.of(load_config(cfg, InferenceOptions, {**flags, "num_steps": 7}), CPU)
    assert again.plan.num_steps == 7


def test_a_guidance_distilled_model_takes_scales(content, tiny_config, write_config, tmp_path):
    told = {**content["model"], "guidance_embed": True, "guidance_img_embed": True, "strict_load": False}
    method = {"training_method": "guidance_distillation", "training_method_config": {"guidance": 3.0}}
    folder = train(write_config(tmp_path / "train.py", {**content, **method, "model": told, "max_steps": 2}))
    file = checkpoint(folder, 2) / "model" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert "guidance_img_in.out_layer.weight" in opened.keys()  # noqa: SIM118
        assert '"scales": "input"' in opened.metadata()["distilled"]
    model = {**told, "strict_load": True, "from_pretrained": str(file)}
    config = {**tiny_config, "model": model, "ae": content["ae"]}
    pipe = VideoPipeline.from_config(config)
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    arguments = {"ref": picture, "cond_type": "i2v_head", "seed": 1}
    plain = pipe("a thing", **arguments)
    assert (plain.plan.num_steps, plain.plan.forwards) == (4, 4)
    for changed in ({"guidance": 9.0}, {"guidance_img": 9.0}):
        assert not torch.equal(pipe("a thing", **arguments, **changed).latents, plain.latents)


def test_a_wrong_number_of_steps_is_warned_about(content, tiny_config, write_config, tmp_path, monkeypatch):
    method = {"training_method": "trajectory_distillation", "training_method_config": {"teacher_steps": 1}}
    folder = train(write_config(tmp_path / "train.py", {**content, **method, "max_steps": 1}))
    config = write_config(tmp_path / "video.py", {**tiny_config, "ae": content["ae"], "model": content["model"]})
    said = []
    monkeypatch.setattr(distilled.logger, "warning", lambda text, *values: said.append(text % values))
    words = [config, "--ckpt-path", checkpoint(folder, 1) / "model" / "model.safetensors", "--prompt", "a thing"]
    main = load_main(ROOT / "scripts" / "diffusion" / "inference.py")
    main([*map(str, words), "--dry-run"])
    assert not said
    main([*map(str, words), "--dry-run", "--num-steps", "9", "--guidance", "3"])
    assert [text.split(":")[0] for text in said] == ["num_steps=9", "guidance=3.0 has no effect"]
