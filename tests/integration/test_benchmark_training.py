"""The benchmark of training runs, on a tiny config."""

import json
import re

import pytest

from opensora.utils.errors import UserError
from tools.benchmark.training import main


def test_figures_of_a_tiny_config(diffusion, tmp_path, capsys):
    out = tmp_path / "figures.json"
    words = ["--steps", "2", "--warm-up", "1", "--bucket", "32px_ar1:1,9,2", "--overhead", "--out", str(out)]
    main([diffusion, *words, "--device", "cpu"])
    figures = json.loads(out.read_text())
    assert figures["steps"] == 2
    assert figures["device"].startswith("CPU")
    names = {"step_s", "bare_step_s", "overhead", "tokens_per_s", "tflops_per_s", "data_wait", "memory_gib"}
    assert names <= figures.keys()
    assert all(figures[name] > 0 for name in names - {"overhead"})
    assert "overhead" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()  # what it trained is gone
    with pytest.raises(UserError, match="--overhead compares steps of one size"):
        main([diffusion, "--overhead", "--bucket_config", "{'32px_ar1:1': {5: (1.0, 1), 9: (1.0, 1)}}"])
    with pytest.raises(UserError, match="--steps"):
        main([diffusion, "--steps", "0"])


def test_memory_of_all_engines(capsys):
    main(["configs/diffusion/train/80gb/stage1.py", "--memory"])
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    total = {(ranks, name): float(values[-2]) for ranks, name, *values in lines[1:]}
    assert total["1", "none"] == total["8", "ddp"] - float(next(x[-4] for x in lines if x[:2] == ["8", "ddp"]))
    assert total["64", "fsdp2"] < total["8", "fsdp2"] == total["64", "fsdp2, shard_size 8"]
    assert total["8", "fsdp2"] < total["8", "zero2"] < total["8", "zero1"] < total["8", "ddp"]
