"""Figures that are there stay, which is found out before anything is measured."""

import importlib

import pytest

from opensora.utils.claims import TakenError, claimed
from opensora.utils.errors import UserError
from tools.outputs import new_folder

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


def test_a_folder_that_was_left_half_full_is_gone_on_with(tmp_path):
    out = tmp_path / "a" / "out"

    def write_half() -> None:
        (out / "first").write_text("1")
        (out / ".unfinished-ab.txt").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_folder(out, "tool"):
        write_half()
    with pytest.raises(UserError, match="exists and is not an empty folder"), new_folder(out, "other"):
        pass
    with new_folder(out, "tool"):
        assert [path.name for path in out.glob("[!.]*")] == ["first"]
    assert [path.name for path in out.iterdir()] == ["first"]
    with pytest.raises(UserError, match="exists and is not an empty folder"), new_folder(out, "tool"):
        pass


def test_a_folder_in_which_nothing_was_made_goes_again(tmp_path):
    with pytest.raises(UserError, match="config"), new_folder(tmp_path / "a" / "out", "tool"):
        raise UserError("a wrong config")
    assert not [*tmp_path.iterdir()]
    with claimed(tmp_path / "out"), pytest.raises(TakenError), new_folder(tmp_path / "out", "tool"):
        pass
