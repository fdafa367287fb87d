"""Keeps one worker running: starts it, restarts it when it ends, and decides what happens to its jobs.

A worker that never comes up is given up: at once if it says that its user is mistaken, else after a few starts. One
that has been ready is started again as long as the server lives.
"""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opensora.config.commands import ServeOptions
from opensora.serving.folders import READY, Folders
from opensora.serving.jobs import JobStore
from opensora.utils.claims import claimed
from opensora.utils.files import write_json
from opensora.utils.logging import get_logger
from opensora.utils.main import MISTAKE

logger = get_logger(__name__)

WORKER = "opensora.serving.worker"
POLL = 0.1  # seconds between looks at the worker
SETTLED = 30.0  # seconds after which the end of a worker that came up is not one of a start that fails
MOST_STARTS = 3  # of a worker that never comes up
LONGEST_PAUSE = 30.0  # seconds between starts that fail
GRACE = 5.0  # seconds for a worker that is told to stop


class Supervisor:
    """Runs the worker in a process of its own.

    Args:
        cfg: of the server.
        folders: where the worker finds its settings.
        store: the jobs.

    Attributes:
        failures: ends of the worker in a row, each before it was ready or soon after its start.
        starts: how often it was started.
        given_up: why it is not started any more, empty while it is.
        at_giving_up: called then, once.
    """

    def __init__(self, cfg: ServeOptions, folders: Folders, store: JobStore) -> None:
        self.cfg, self.folders, self.store = cfg, folders, store
        self.failures = self.starts = 0
        self.given_up = ""
        self.at_giving_up: Callable[[], None] = lambda: None
        self._comes_up = self._came_up = False  # this worker, one of this server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @property
    def state(self) -> str:
        """``starting``, ``ready``, or ``failing`` after several ends in a row."""
        if self._ready.exists():
            return "ready"
        return "failing" if self.failures > 2 else "starting"

    @property
    def _ready(self) -> Path:
        return self.folders.root / READY

    def start(self) -> None:
        """Start it, in a thread."""
        self._ready.unlink(missing_ok=True)  # of a server that was killed
        self._write_settings()
        self._thread.start()

    def stop(self) -> None:
        """End the worker; what it was making waits for the next one."""
        self._stopping.set()
        self._thread.join()

    def _write_settings(self) -> None:
        import psutil

        config = {**self.cfg.to_dict(), "config_path": self.cfg.config_path, "data_dir": str(self.folders.root)}
        config = {key: value for key, value in config.items() if not key.startswith("api_key")}
        pid = os.getpid()
        write_json({"config": config, "pid": pid, "started": psutil.Process(pid).create_time()}, self.folders.settings)

    def _run(self) -> None:
        while not self._stopping.is_set():
            began, status = time.monotonic(), None
            try:
                with claimed(self.folders.worker, is_folder=False, wait=True):
                    self.store.recover()  # nobody makes anything now
                status = self._work()
                said = f"has ended (status {status}, for the reason above)"
            except (OSError, sqlite3.Error) as error:  # no room on the disk, say, or for a process
                said = f"cannot be started ({error})"
            if self._stopping.is_set():
                return
            self._count(time.monotonic() - began)
            if not self._came_up and (status == MISTAKE or self.failures >= MOST_STARTS):
                self.given_up = f"the worker {said} and was never ready"
                self.at_giving_up()
                return
            pause = min(0.1 * 2**self.failures, LONGEST_PAUSE)
            logger.warning("the worker %s; it is started again in %.1f s", said, pause)
            self._stopping.wait(pause)

    def _count(self, seconds: float) -> None:
        """Note an end of the worker, so long after its start."""
        self._came_up |= self._comes_up
        self.failures = 0 if self._comes_up and seconds > SETTLED else self.failures + 1
        self._comes_up = False

    def _work(self) -> int | None:
        """Run the worker to its end, or to the server's; its exit status."""
        self._ready.unlink(missing_ok=True)
        self.starts += 1
        process = subprocess.Popen(self._command())
        while process.poll() is None:
            if self._stopping.wait(POLL):
                self._end(process)
                self.store.give_back()
        self._comes_up = self._ready.exists()
        self._ready.unlink(missing_ok=True)
        return process.returncode

    def _command(self) -> list[str]:
        count = self.cfg.worker_processes
        if count == 1:
            return [sys.executable, "-m", WORKER, str(self.folders.settings)]
        ranks = ["-m", "opensora.acceleration.launch", "--nproc_per_node", str(count), "--standalone", "-m", WORKER]
        return [sys.executable, *ranks, str(self.folders.settings)]

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
