"""Every shipped inference config has a small twin that takes the same path, and the prompt tables that come with it."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.prepared import PreparedRun
from opensora.utils.video import read_image, read_video

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "diffusion" / "inference"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.py") if not path.name.startswith("demo"))
# What decides which code runs; sizes and weights may differ.
SAME = (
    "plugin",
    "plugin_ae",
    "plugin_config",
    "plugin_config_ae",
    "patch_size",
    "use_t2i2v",
    "cond_type",
    "batch_size",
)
SAME_OPTIONS = (
    "text_osci",
    "image_osci",
    "scale_temporal_osci",
    "method",
    "shift",
    "is_causal_vae",
    "temporal_reduction",
)
SAME_OF_MODELS = ("guidance_embed", "cond_embed", "fused_qkv", "use_liger_rope", "patch_size")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_has_a_twin_of_its_kind(name):
    large, small = (load_config(path, InferenceOptions) for path in (CONFIGS / name, CONFIGS / "demo" / name))
    for key in SAME:
        assert getattr(small, key) == getattr(large, key), key
    for key in SAME_OPTIONS:
        assert getattr(small.sampling_option, key) == getattr(large.sampling_option, key), key
    assert (small.motion_score is None) == (large.motion_score is None)
    runs = [PreparedRun.of(cfg, torch.device("cpu")).models for cfg in (small, large)]
    assert runs[0].keys() == runs[1].keys()
    for section in runs[0]:
        models = [models[section] for models in runs]
        assert type(models[0]) is type(models[1]), section
        for key in () if "ae" in section else SAME_OF_MODELS:
            assert getattr(models[0].config, key) == getattr(models[1].config, key), f"{section}.{key}"


@pytest.fixture
def run_twin(inference_main, tmp_path, monkeypatch):
    """Run a small twin from the repository's root, in as little as shows its path; returns what it saved."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *words: str) -> list[Path]:
        short = ("--num_frames", "8" if name == "high_compression.py" else "5", "--save-dir", str(tmp_path))
        return inference_main([f"configs/diffusion/inference/demo/{name}", *short, *words])

    return run


@pytest.mark.parametrize("name", SHIPPED)
def test_twin_makes_a_video(run_twin, caplog, name):
    (path,) = run_twin(name, "--prompt", "raining, sea", "--num_steps", "2", "--offload", "True", "--num-sample", "1")
    frames, _ = read_video(path)
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.with_suffix(".txt").read_text() == "raining, sea. 8 FPS. 4 motion score."
    assert list(frames.shape) == record["frames"]
    random = {key for key, facts in record["weights"].items() if facts["path"].startswith("random weights")}
    if "t2i2v" in name or name == "high_compression.py":
        assert record["cond_type"] == "i2v_head"
        picture = read_image(path.parent / "generated_condition" / f"{path.stem}.png")
        assert picture.shape == (64, 64, 3)
    assert not random


@pytest.mark.parametrize("name", SHIPPED)
def test_plan_of_a_twin(run_twin, capsys, tmp_path, name):
    assert run_twin(name, "--prompt", "raining, sea", "--dry-run", "True") == []
    plan = capsys.readouterr().out
    assert ("picture      64 x 64 first" in plan) == ("t2i2v" in name or name == "high_compression.py")
    assert "0.2M t5" in plan
    assert "random, no from_pretrained" not in plan
    assert list(tmp_path.iterdir()) == []


def test_the_prompt_tables():
    folder = ROOT / "assets" / "texts"
    for name in ("example", "i2v", "sora"):
        table = pd.read_csv(folder / f"{name}.csv")
        assert list(table.columns) == (["text", "ref"] if name == "i2v" else ["text"])
        assert table.text.str.strip().str.len().min() > 0
        assert table.text.is_unique
    with Image.open(ROOT / pd.read_csv(folder / "i2v.csv").ref[0]) as picture:
        assert picture.size == (1024, 576)


def test_tables_run(run_twin):
    (video,) = run_twin(
        *("256px.py", "--cond_type", "i2v_head", "--dataset.data-path", "assets/texts/i2v.csv", "--num_steps", "1")
    )
    assert json.loads(video.with_suffix(".json").read_text())["cond_type"] == "i2v_head"
    pictures = run_twin(
        "256px.py", "--dataset.data-path", "assets/texts/example.csv", "--num_steps=1", "--num_frames=1"
    )
    assert len(pictures) == 8
