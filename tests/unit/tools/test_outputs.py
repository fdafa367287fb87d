"""Figures that are there stay, which is found out before anything is measured."""

import importlib

import pytest

from opensora.utils.errors import UserError
from tools.outputs import named_errors

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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a"), "a: No such file"),
        (OSError(36, "File name too long", b"x\xff"), "File name too long"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("Symlink loop from '/a'"), "Symlink loop from '/a'"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, message):
    @named_errors
    def main(argv):
        raise error

    with pytest.raises(UserError, match=message) as found:
        main([])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("a fault of ours"), KeyError("x")])
def test_other_errors_stay_what_they_are(error):
    @named_errors
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        main([])
