"""Servers for tests: everything but the processes is real; the worker runs in a thread of the test's."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from opensora.config import load_config
from opensora.config.commands import ServeOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.serving.command import listen
from opensora.serving.http import create_app
from opensora.serving.jobs import Job, JobStore
from opensora.serving.run import make_service
from opensora.serving.service import Service
from opensora.serving.worker import Worker

Config = str | Path | Mapping[str, Any]


def served(config: Config, folder: Path, **changes: Any) -> Service:
    """A service of a config that keeps its jobs in a folder, without a worker."""
    cfg = load_config(config, ServeOptions, {"data_dir": str(folder), "device": "cpu", **changes})
    return make_service(cfg, {}, works=False)


def worker_of(service: Service) -> Worker:
    """A worker of a service, in this process, with a connection of its own."""
    store = JobStore(service.folders.database)
    return Worker(service.desk, VideoPipeline.from_prepared(service.desk.run), store, service.folders)


@contextmanager
def working(service: Service) -> Iterator[Worker]:
    """Within it, a thread makes the jobs of a service."""
    worker, ends = worker_of(service), threading.Event()

    def run() -> None:
        torch.set_num_threads(1)
        worker.run(ends.is_set)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield worker
    finally:
        ends.set()
        thread.join(300)


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """Within it, a service answers at an address."""
    with service.running(), listen("127.0.0.1", 0) as place:
        config = uvicorn.Config(create_app(service), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def until(holds: Any, seconds: float = 300) -> None:
    """Wait until something holds; fails if it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come to that in time"
        time.sleep(0.02)


def finished(store: JobStore, id: str) -> Job:
    """A job once it is finished."""
    until(lambda: not store[id].is_open)
    return store[id]
