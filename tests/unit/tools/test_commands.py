"""Every command finds the package from any folder, installed or not, and ends as `run_main` has it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOREIGN = {ROOT / "tools" / "benchmark" / "gpu_parts" / "original.py"}  # runs beside another package of our name
PROGRAMS = {path for folder in ("scripts", "tools") for path in (ROOT / folder).rglob("*.py")} - FOREIGN
COMMANDS = sorted(path for path in PROGRAMS if "__main__" in path.read_text())
FIND = 'if __package__ in (None, ""):\n    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))\n'


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_way(path):
    text = path.read_text()
    up = len(path.relative_to(ROOT).parts) - 1
    assert FIND.replace("parents[2]", f"parents[{up}]") in text.partition("from opensora")[0]
    assert re.search(r'if __name__ == "__main__":\n    run_main\(main\)\n$', text)


# whose functions look at the numbers themselves
LOOK_THEMSELVES = ("to_diffusers.py", "widen_decoder.py", "make_clips.py", "measured.py")


def test_every_number_of_a_tool_is_bounded():
    loose = []
    for path in sorted((ROOT / "tools").rglob("*.py")):
        text = path.read_text()
        if path.name in LOOK_THEMSELVES or "check_counts(args, " in text:
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}  # None: a dict of more
                if given.get("type") in ("int", "float") and not {"action", None} & given.keys():
                    loose.append(f"{path.name}: {ast.unparse(call.args[0])}")
    assert loose == []


@pytest.mark.parametrize("name", ["scripts/cnv/shard.py", "scripts/diffusion/train.py", "tools/demo/draw_picture.py"])
def test_from_another_folder(tmp_path, name):
    """The package beside the script is taken, whatever is installed."""
    code = f"import runpy; runpy.run_path({str(ROOT / name)!r}); import opensora; print(opensora.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip().splitlines()[-1]).parents[1] == ROOT
