"""Functions and programs in processes that are forked from one which has imported everything: that takes seconds."""

import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
FORKS = get_context("forkserver")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def forked(function: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """A process that runs a function of a module; it has started, and ends with the function."""
    FORKS.set_forkserver_preload(["tests.helpers.imported"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    return process


class Program:
    """A script in a process of its own, as from a shell; it has started.

    Args:
        script: its file, or the name of a module.
        words: its command line.
        folder: where what it prints goes.
    """

    def __init__(self, script: Path | str, *words: object, folder: Path) -> None:
        number = len([*folder.glob("said-*")])
        self._out, self._said = folder / f"printed-{number}", folder / f"said-{number}"
        self._said.touch()
        self.process = forked(run_program, str(script), [*map(str, words)], str(self._out), str(self._said))

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process.pid is not None
        return self.process.pid

    def ended(self, seconds: float = 1200) -> int:
        """Its exit status, once it has one."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it has not ended in {seconds:g} s: {self.said}"
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    @property
    def printed(self) -> str:
        """What it has written to standard output."""
        return self._out.read_text()

    @property
    def said(self) -> str:
        """What it has written to standard error."""
        return self._said.read_text()


def run_program(script: str, words: list[str], out: str, said: str) -> None:
    """In the forked process."""
    for name, stream in ((out, 1), (said, 2)):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, stream)
        os.close(handle)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.update(ENVIRONMENT)
    sys.argv = [script, *words]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
