"""Help and mistyped keys answer at once: no script imports torch before its command line is read."""

import json
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
import contextlib, io, json, runpy, sys
ends = {}
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = words
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            ends[name] = end.code, "torch" in sys.modules
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends() -> dict[str, list]:
    """Exit status of each command line, and whether torch is there by then: one after the other in one process."""
    lines = {script: [script, "--help"] for script in SCRIPTS}
    lines |= {f"{script} typo": [script, f"configs/{CONFIGS[script]}.py", "--num_stepz", "3"] for script in CONFIGS}
    told = {name: [str(ROOT / "scripts" / f"{script}.py"), *words] for name, (script, *words) in lines.items()}
    command = [sys.executable, "-c", RUN, json.dumps(told)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(ends, script):
    assert ends[script] == [0, False]


@pytest.mark.parametrize("script", CONFIGS)
def test_a_mistyped_key(ends, script):
    assert ends[f"{script} typo"] == [2, False]
