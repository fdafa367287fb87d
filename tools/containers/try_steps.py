"""Follow a Dockerfile without Docker: its COPY and pip lines in a fresh virtual environment, then its command and its
health check.

    python tools/containers/try_steps.py Dockerfile --folder /tmp/container --build-arg TORCH_INDEX=https://pypi.org/simple

What needs root (apt-get, users) is left out, and said. Places of the image (``/data``, ``/run/secrets``) become folders
below ``--folder``; the port stays.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from tools.arguments import user_path
from tools.containers.dockerfile import Instruction, health_command, last, read_dockerfile, variables
from tools.outputs import is_new

ROOT_ONLY = ("apt-get", "useradd")
PLACES = ("/data", "/run/secrets", "/app")
KEY = "a key of this trial"
WAIT_SECONDS = 300


class Trial:
    """One Dockerfile in a folder.

    Args:
        file: the Dockerfile.
        folder: new or empty.
        arguments: values of its ARGs, by name.
    """

    def __init__(self, file: Path, folder: Path, arguments: dict[str, str]) -> None:
        self.context, self.folder = file.resolve().parent, folder
        self.instructions = read_dockerfile(file)
        self.app = folder / "app"
        paths = f"{folder / 'env' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = {**inherited, **dict(variables(self.instructions, arguments)), "PATH": paths}

    def build(self) -> None:
        """COPY and RUN, in their order."""
        venv.create(self.folder / "env", with_pip=True)
        for each in self.instructions:
            if each.name == "COPY":
                self._copy(each)
            elif each.name == "RUN":
                self._run(each)

    def _copy(self, instruction: Instruction) -> None:
        *sources, target = instruction.words
        print(f"COPY {instruction.text}", flush=True)
        for source in sources:
            place = self.app / target
            if (self.context / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(self.context / source, place, ignore=ignored, dirs_exist_ok=True)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / source, place)

    def _run(self, instruction: Instruction) -> None:
        if any(word in instruction.text for word in ROOT_ONLY):
            print(f"left out, it needs root: RUN {instruction.text}", flush=True)
            return
        print(f"RUN {instruction.text}", flush=True)
        self.app.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["/bin/sh", "-c", instruction.text], cwd=self.app, env=self.environment)
        if done.returncode:
            raise UserError(f"RUN {instruction.text}: ended with status {done.returncode}")

    def serve(self) -> float:
        """Start the command, wait until the health check passes, and end it; seconds that it took.

        Raises:
            UserError: it ended, or does not become healthy.
        """
        (self.folder / "run" / "secrets").mkdir(parents=True, exist_ok=True)
        (self.folder / "run" / "secrets" / "api_key").write_text(KEY)
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        words = [*last(self.instructions, "ENTRYPOINT").words, *last(self.instructions, "CMD").words]
        print(f"CMD {' '.join(words)}", flush=True)
        start = time.monotonic()
        with subprocess.Popen([*map(self._here, words)], cwd=data, env=self.environment) as server:
            try:
                self._until_healthy(server, start)
            finally:
                server.terminate()
        return time.monotonic() - start

    def _until_healthy(self, server: subprocess.Popen, start: float) -> None:
        check = health_command(self.instructions)
        while subprocess.run(check, env=self.environment, capture_output=True).returncode:
            if server.poll() is not None:
                raise UserError(f"the command ended with status {server.returncode}")
            if time.monotonic() - start > WAIT_SECONDS:
                raise UserError(f"the health check failed for {WAIT_SECONDS} s")
            time.sleep(1)

    def _here(self, word: str) -> str:
        """A word of a command, places of the image in the folder."""
        return f"{self.folder}{word}" if word.startswith(PLACES) else word


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and follow the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=user_path, help="Dockerfile")
    parser.add_argument("--folder", type=user_path, required=True, help="new folder to work in; it stays")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    args = parser.parse_args(argv)
    if not is_new(args.folder):
        raise UserError(f"--folder {args.folder} is not empty")
    given = dict(each.partition("=")[::2] for each in args.build_arg)
    trial = Trial(args.file, args.folder.absolute(), given)
    trial.build()
    print(f"healthy after {trial.serve():.0f} s")


if __name__ == "__main__":
    run_main(main)
