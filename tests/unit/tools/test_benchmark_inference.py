"""The benchmark of inference runs, and compares two loops that agree."""

import json

import pytest

from opensora.benchmark import sampler
from opensora.cli import benchmark
from opensora.diffusion.guidance import count_forwards


@pytest.mark.parametrize(("condition", "forwards"), [("t2v", 6), ("i2v_head", 9)])
def test_figures_of_a_run(tiny_config_file, tmp_path, capsys, condition, forwards):
    out = tmp_path / "figures.json"
    words = ["--config", str(tiny_config_file), "--random-weights", "--comparison", "0", "--out", str(out)]
    words += ["--dtype", "bf16"] if condition == "t2v" else ["--offload", "True"]
    benchmark.main([*words, "--num_steps", "3", "--cond_type", condition])
    figures = json.loads(out.read_text())["inference"]
    assert (figures["condition"], figures["steps"], figures["forwards"]) == (condition, 3, forwards)
    assert len(figures["step_s"]) == 3
    assert {"text_s", "references_s", "denoise_s", "decode_s", "total_s"} <= figures.keys()
    assert figures["tflop_per_s"] > 0
    assert figures["denoise_s_at_50_steps"] > 0
    assert "| forwards |" in capsys.readouterr().out


def test_both_loops_agree(monkeypatch):
    monkeypatch.setattr(sampler, "STEPS", 14)
    monkeypatch.setattr(sampler, "LATENT", (2, 8, 8))
    monkeypatch.setattr(sampler, "TEXT_TOKENS", 8)
    rows = sampler.compare_samplers(2)
    assert [row.condition for row in rows] == ["t2v", "i2v_head"]
    for row in rows:
        assert row.difference < 1e-4
        assert len(row.seconds) == len(row.plain_seconds) == 2
    assert [row.forwards for row in rows] == [26, 38]
    assert [count_forwards(sampler.GUIDANCE, 50, has_image) for has_image in (False, True)] == [80, 110]
