"""Kills a server's worker, or the server itself, at random moments, and looks at what became of the jobs.

python -m tests.integration.serving_kills --moments 30 --kill worker
python -m tests.integration.serving_kills --moments 30 --kill server
"""

import argparse
import json
import os
import random
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora.utils.video import read_video
from tests.conftest import tiny_inference_config
from tests.helpers.forks import Program

ROOT = Path(__file__).parents[2]
JOBS, STEPS = 3, 12
PATIENCE = 600.0  # of machines that do much else as well


class Server:
    """A server in a process of its own, on one folder, that is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.config = folder, folder / "data", folder / "tiny.py"
        self.config.write_text("\n".join(f"{key} = {value!r}" for key, value in tiny_inference_config().items()))
        with socket.create_server(("127.0.0.1", 0)) as place:
            self.port = place.getsockname()[1]
        self.process = self._started()

    def _started(self) -> Program:
        """Forked, to be quick; its workers are processes that import everything anew."""
        words = [self.config, "--port", self.port, "--data-dir", self.data, "--page", False]
        return Program(ROOT / "scripts" / "serve.py", *words, folder=self.folder)

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers; waits for one that is just starting."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            data = answer.read()
        return data if path.endswith("content") else json.loads(data)

    def wait(self, holds: Callable[[], Any], pause: float = 0.2) -> Any:
        """What ``holds`` gives, once it gives something; asked again after so many seconds."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if found := holds():
                    return found
            except (ConnectionError, urllib.error.URLError) as error:
                if isinstance(error, urllib.error.HTTPError):
                    raise
            assert time.monotonic() < end, self.process.said[-3000:]
            time.sleep(pause)

    def kill_worker(self) -> None:
        """SIGKILL to the process that makes jobs."""
        os.kill(int((self.data / "worker.ready").read_text()), signal.SIGKILL)

    def kill_server(self) -> None:
        """SIGKILL to the server, which is then started again."""
        self.process.kill()
        self.process = self._started()

    def stop(self) -> None:
        """End it."""
        self.process.process.terminate()
        self.process.ended(PATIENCE)

    # ------------------------------------------------------------------------------------------------------------ jobs

    def ask(self) -> list[str]:
        """Send a few jobs; their names."""
        body = {"prompt": "a", "num_frames": 5, "num_inference_steps": STEPS}
        return [self.call("/v1/videos", {**body, "seed": seed})["id"] for seed in range(JOBS)]

    def states(self, ids: list[str]) -> list[str]:
        """What they have come to."""
        return [self.call(f"/v1/videos/{id}")["status"] for id in ids]

    def survive(self, kill: Callable[[], None], delay: float) -> None:
        """Kill something ``delay`` seconds after a job was started; all jobs come to their end, and their files are
        whole."""
        self.wait(lambda: self.call("/health")["worker"] == "ready")
        ids = self.ask()
        self.wait(lambda: {"in_progress", "completed"} & {*self.states(ids)}, pause=0.02)
        time.sleep(delay)
        kill()
        self.wait(lambda: set(self.states(ids)) <= {"completed", "failed", "cancelled"})
        assert self.states(ids) == ["completed"] * JOBS, [self.call(f"/v1/videos/{id}") for id in ids]
        assert {video["id"] for video in self.call("/v1/videos")["data"]} == set(ids)
        for id in ids:
            self._check_files(id)

    def _check_files(self, id: str) -> None:
        content = self.call(f"/v1/videos/{id}/content")
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            Path(file.name).write_bytes(content)
            assert read_video(file.name)[0].shape == (5, 32, 32, 3)
        left = {path.name for path in (self.data / "jobs" / id).iterdir()} - {"preview.webp"}
        whole = {"video.mp4", "video.json", "video.txt", "thumbnail.webp", "spritesheet.jpg"}
        assert {name for name in left if not name.startswith(".unfinished-")} == whole, left
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/videos/{id}", method="DELETE")
        urllib.request.urlopen(request, timeout=PATIENCE).close()


def main() -> None:
    """Kill so many times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--kill", choices=("worker", "server"), default="worker")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            for number in range(given.moments):
                delay = moments.uniform(0.0, 0.8)
                server.survive(getattr(server, f"kill_{given.kill}"), delay)
                print(f"{number + 1}: {given.kill} killed after {delay:.2f} s, all {JOBS} jobs completed", flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
