"""The command ``opensora``: finds the command that is meant, and runs it. Imports none of the others."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

from opensora.acceleration.torchrun import Torchrun
from opensora.utils.errors import UserError
from opensora.utils.main import DEBUG_FLAG, run_main

PROGRAM = "opensora"
HELP_FLAGS = ("--help", "-h")
PROCESS_FLAGS = ("--nproc", "--nproc-per-node", "--nproc_per_node")


class Command(NamedTuple):
    """One of the commands.

    Attributes:
        module: whose ``main(argv)`` runs it.
        help: one line.
        ranks: whether several processes may run it together.
    """

    module: str
    help: str
    ranks: bool = False


COMMANDS = {
    "generate": Command("opensora.cli.generate", "make videos from prompts, pictures and clips", ranks=True),
    "decode": Command("opensora.cli.decode", "turn kept latents into videos"),
    "train": Command("opensora.cli.train", "train the diffusion model", ranks=True),
    "train-vae": Command("opensora.cli.train_vae", "train a video autoencoder", ranks=True),
    "cache": Command("opensora.cli.cache", "compute latents and text embeddings beforehand"),
    "trajectories": Command(
        "opensora.cli.trajectories", "sample a teacher's trajectories for a student of few steps", ranks=True
    ),
    "meta": Command("opensora.cli.meta", "add length, size and frame rate of every clip to a table"),
    "shard": Command("opensora.cli.shard", "split a parquet table into shards"),
    "reconstruct": Command("opensora.cli.reconstruct", "reconstruct clips and measure how well"),
    "vae-stats": Command("opensora.cli.vae_stats", "latent statistics per channel, to paste into a config"),
    "serve": Command("opensora.serving.command", "serve a page in the browser, and the videos API of OpenAI"),
    "benchmark": Command("opensora.cli.benchmark", "seconds per stage and step, peak memory and TFLOP/s of a video"),
    "doctor": Command("opensora.cli.doctor", "see whether this machine has what is needed, and make a small video"),
}


def main() -> None:
    """Run the words of this process; no traceback reaches the user.

    Raises:
        SystemExit: unless all went well, with the statuses of :func:`opensora.utils.main.run_main`.
    """
    debug = [DEBUG_FLAG] if DEBUG_FLAG in sys.argv[1:] else []
    run_main(lambda argv: dispatch(sys.argv[1:] if argv is None else argv, debug))


def dispatch(words: Sequence[str], debug: Sequence[str] = ()) -> None:
    """Run one command.

    Args:
        words: its name and what it gets.
        debug: words for the processes that it is to start, which :func:`run_main` takes from this one's.

    Raises:
        UserError: an unknown command; names the nearest.
        SystemExit: status 0, after ``--help`` and ``--version``.
    """
    if not words:
        raise UserError(f"no command given: {', '.join(COMMANDS)}; {PROGRAM} --help says what they do")
    name, *rest = words
    if name in HELP_FLAGS:
        print(help_text())
        raise SystemExit(0)
    if name == "--version":
        print(f"{PROGRAM} {version()}")
        raise SystemExit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(COMMANDS)}"
        raise UserError(f"'{name}' is not a command of {PROGRAM}; {hint}")
    command = COMMANDS[name]
    if command.ranks:
        count, rest = split_processes(rest)
        if count is not None and not set(HELP_FLAGS) & set(rest):
            start_processes(count, [name, *rest, *debug])
            return
    sys.argv = [f"{PROGRAM} {name}", *rest]  # the name in usage lines
    importlib.import_module(command.module).main(None)


def split_processes(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """How many processes ``--nproc N`` asks for (None: it is not there), and the other words.

    Raises:
        UserError: no positive number, or the flag in a process that torchrun started.
    """
    rest: list[str] = []
    count: int | None = None
    left = iter(words)
    for word in left:
        flag, equals, text = word.partition("=")
        if flag not in PROCESS_FLAGS:
            rest.append(word)
            continue
        text = text if equals else next(left, "")
        if not (text.isascii() and text.isdigit() and int(text)):
            raise UserError(f"{flag} {text}: expected a number of processes, 1 or more")
        count = int(text)
    if count is not None and Torchrun.read(os.environ).world_size > 1:
        raise UserError(f"--nproc {count}: torchrun started this process as one of several already; leave one away")
    return count, rest


def start_processes(count: int, words: Sequence[str]) -> None:
    """Run a command in several processes of this machine, as ``torchrun --standalone`` does.

    Raises:
        SystemExit: one of them failed, with its status.
    """
    from opensora.acceleration.launch import main as launch  # imports torch

    launch(["--nproc_per_node", str(count), "--standalone", "-m", PROGRAM, *words])


def version() -> str:
    """Version of the installed package."""
    try:
        return metadata.version(PROGRAM)
    except metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def help_text() -> str:
    """What ``opensora --help`` prints."""
    width = max(map(len, COMMANDS))
    ranks = ", ".join(name for name, command in COMMANDS.items() if command.ranks)
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Train and run text- and image-to-video diffusion models.",
            "",
            *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()),
            "",
            f"{PROGRAM} COMMAND --help lists what a command takes; {PROGRAM} --version prints the version.",
            f"--nproc N runs {ranks} in N processes; on several machines: torchrun ... -m {PROGRAM} COMMAND ...",
            f"{DEBUG_FLAG} shows the traceback of an error that nobody foresaw.",
        ]
    )
