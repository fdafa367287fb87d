"""Help and mistyped keys answer at once: no script imports torch before its command line is read."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = {"diffusion/inference": "diffusion/inference/demo", "vae/train": "vae/train/demo"}
SCRIPTS = sorted(
    str(path.relative_to(ROOT / "scripts").with_suffix("")) for path in (ROOT / "scripts").glob("[dv]*/*.py")
)
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("status", end.code, "torch" in sys.modules)
"""


def answer(script: str, *words: str) -> str:
    path = ROOT / "scripts" / f"{script}.py"
    command = [sys.executable, "-c", RUN, str(path), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    assert answer(script, "--help") == "status 0 False"


@pytest.mark.parametrize("script", CONFIGS)
def test_a_mistyped_key(script):
    assert answer(script, f"configs/{CONFIGS[script]}.py", "--num_stepz", "3") == "status 2 False"
