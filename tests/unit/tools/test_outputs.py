"""Figures that are there stay, which is found out before anything is measured."""

import importlib

import pytest

from opensora.utils.errors import UserError

COMMANDS = {
    "inference": ["--config", "configs/diffusion/inference/demo.py"],
    "training": ["configs/diffusion/train/demo_cpu.py"],
    "data": [],
    "models": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_figures_that_are_there_stay(name, tmp_path):
    out = tmp_path / "figures.json"
    out.write_text("mine")
    main = importlib.import_module(f"tools.benchmark.{name}").main
    with pytest.raises(UserError, match=r"--out .*figures.json exists; give another name, or --overwrite"):
        main([*COMMANDS[name], "--out", str(out)])
    assert out.read_text() == "mine"
    with pytest.raises(UserError, match=r"figures.json is a file; give a folder"):
        main([*COMMANDS[name], "--out", str(out / "deeper.json"), "--overwrite"])
