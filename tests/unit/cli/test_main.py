"""The command ``opensora``: which command is meant, its processes, and how it ends."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.cli import main as cli
from opensora.cli.main import COMMANDS, dispatch, split_processes
from opensora.utils.errors import UserError
from tests.helpers.cli import load_main

ROOT = Path(__file__).parents[3]
SCRIPTS = {
    "generate": "scripts/diffusion/inference.py",
    "decode": "scripts/diffusion/decode.py",
    "train": "scripts/diffusion/train.py",
    "cache": "scripts/diffusion/cache.py",
    "trajectories": "scripts/diffusion/trajectories.py",
    "train-vae": "scripts/vae/train.py",
    "reconstruct": "scripts/vae/inference.py",
    "vae-stats": "scripts/vae/stats.py",
    "meta": "scripts/cnv/meta.py",
    "shard": "scripts/cnv/shard.py",
    "serve": "scripts/serve.py",
    "benchmark": "tools/benchmark/inference.py",
}
# what answers before anything large is imported
ANSWER = """
import sys
sys.argv = ["opensora", *sys.argv[1:]]
from opensora.cli.main import main
try:
    main()
except SystemExit as end:
    print("status", end.code, "torch" in sys.modules, "mmengine" in sys.modules)
"""


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """What processes would have been started with."""
    started: list[list[str]] = []
    monkeypatch.setattr("opensora.acceleration.launch.main", started.append)
    return started


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_scripts_are_the_same_code(name, script):
    assert load_main(ROOT / script) is importlib.import_module(COMMANDS[name].module).main


def test_version(monkeypatch, capsys):
    def absent(name):
        raise cli.metadata.PackageNotFoundError(name)

    for found, said in (
        (lambda name: "9.8", "opensora 9.8\n"),
        (absent, "opensora of a checkout that is not installed\n"),
    ):
        monkeypatch.setattr(cli.metadata, "version", found)
        with pytest.raises(SystemExit):
            dispatch(["--version"])
        assert capsys.readouterr().out == said


def test_every_command_is_a_script_or_new():
    assert {*COMMANDS} - {*SCRIPTS} == {"doctor"}


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command(words, capsys):
    with pytest.raises(SystemExit) as end:
        dispatch(words)
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert all(
        re.search(rf"^  {name} +{re.escape(command.help)}$", told, re.MULTILINE) for name, command in COMMANDS.items()
    )


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_grouped_and_narrow(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["opensora"])
    with pytest.raises(SystemExit) as end:
        dispatch([*([name] if name else []), "--help"])
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    headings = [line for line in lines if re.fullmatch(r"[a-zA-Z][\w ,]*:", line)]
    assert set(headings) - {"options:", "short for:"}, "keys stand under headings that say what they are for"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no command given: generate, decode, "),
        (["genrate"], "'genrate' is not a command of opensora; did you mean 'generate'?"),
        (["train_vae"], "did you mean 'train-vae'?"),
        (["xyz"], "'xyz' is not a command of opensora; known: generate, "),
        (["generate"], "no config file given; usage: opensora generate CONFIG"),
        (["generate", "demo", "--nproc"], "--nproc : expected a number of processes, 1 or more"),
        (["train", "demo", "--nproc", "0"], "--nproc 0: expected a number of processes, 1 or more"),
        (["train", "demo", "--nproc-per-node=two"], "--nproc-per-node two: expected a number"),
    ],
)
def test_mistakes(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["opensora"])
    with pytest.raises(UserError, match=re.escape(said)):
        dispatch(words)


def test_the_help_of_a_command_is_its_scripts(monkeypatch, capsys):
    told = []
    for argv, run in ((["opensora"], lambda: dispatch(["cache", "--help"])), (["cache.py", "--help"], None)):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit):
            run() if run else load_main(ROOT / "scripts" / "diffusion" / "cache.py")(None)
        told.append(capsys.readouterr().out.split("\n", 1))
    assert told[0][0] == "usage: opensora cache CONFIG [--key value | --key=value | --flag] ..."
    assert told[0][1] == told[1][1]


def test_processes(launched, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["opensora"])
    dispatch(["train", "demo_cpu", "--nproc", "2", "--seed", "1"], ["--debug"])
    assert launched == [
        ["--nproc_per_node", "2", "--standalone", "-m", "opensora", "train", "demo_cpu", "--seed", "1", "--debug"]
    ]
    assert split_processes(["a", "--nproc=3", "b"]) == (3, ["a", "b"])
    assert split_processes(["a", "--num_nproc", "3"]) == (None, ["a", "--num_nproc", "3"])
    with pytest.raises(SystemExit):
        dispatch(["train", "--help", "--nproc", "2"])
    assert len(launched) == 1, "help needs one process"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--nproc 2: torchrun started this process"):
        dispatch(["train", "demo_cpu", "--nproc", "2"])


def test_commands_of_one_process_leave_the_flag_alone(launched, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["opensora"])
    with pytest.raises(UserError, match="--nproc is not a known key"):
        dispatch(["cache", "demo_cpu", "--nproc", "2"])
    assert launched == []


def test_as_a_program():
    """Help and typos import no torch; help not even the reader of configs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = []
    for words in (["--help"], ["genrate"], ["generate", "demo", "--num_stepz", "3"]):
        command = [sys.executable, "-c", ANSWER, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told.append((done.stdout.splitlines()[-1], done.stderr))
    assert [line for line, _ in told] == ["status 0 False False", "status 2 False False", "status 2 False True"]
    assert told[2][1].startswith("error: --num_stepz is not a known key")
    assert cli.PROGRAM == "opensora"
