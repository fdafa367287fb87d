"""What is known before weights is found out once, and handed on."""

from collections import Counter
from pathlib import Path

import pytest

from opensora.config import load
from opensora.diffusion.prepared import PreparedRun
from opensora.models import build

ROOT = Path(__file__).parents[2]
VIDEO, PICTURE = Counter(("flux", "hunyuan_vae")), Counter(("flux", "autoencoder_2d"))
TEXT = Counter({"text_embedder": 2})


@pytest.fixture
def built(monkeypatch) -> dict[str, Counter[str]]:
    """Types of the models that are built on ``meta`` and with weights (``real``), and how often a run is prepared."""
    counts: dict[str, Counter[str]] = {"meta": Counter(), "real": Counter(), "calls": Counter()}

    def counted(section, registry, **overrides):
        model = build_module(section, registry, **overrides)
        kind = section["type"] if isinstance(section, dict) else section.type
        counts["meta" if overrides["device_map"] == "meta" else "real"][kind] += 1
        return model

    def watched(name, function):
        def call(*arguments, **options):
            counts["calls"][name] += 1
            return function(*arguments, **options)

        return call

    build_module = build.build_module
    monkeypatch.setattr(build, "build_module", counted)
    monkeypatch.setattr(PreparedRun, "check_resources", watched("resources", PreparedRun.check_resources))
    monkeypatch.setattr(load, "_resolve", watched("config", load._resolve))
    monkeypatch.chdir(ROOT)
    return counts


@pytest.mark.parametrize(
    ("config", "meta"), [("demo.py", VIDEO), ("256px_tp.py", VIDEO), ("t2i2v_256px.py", VIDEO + PICTURE)]
)
def test_a_model_is_built_once_without_weights_and_once_with(inference_main, tmp_path, built, config, meta):
    path = f"configs/diffusion/inference/{'' if config == 'demo.py' else 'demo/'}{config}"
    words = [path, "--prompt", "raining, sea", "--num_steps", "1", "--num_frames", "5", "--num_sample", "1"]
    words += ["--save-dir", str(tmp_path)]
    once = Counter(("config", "resources"))
    assert inference_main([*words, "--dry-run", "True"]) == []
    assert built == {"meta": meta, "real": Counter(), "calls": once}
    for counter in built.values():
        counter.clear()
    assert len(inference_main(words)) == 1
    assert built == {"meta": meta, "real": meta + TEXT, "calls": once}
