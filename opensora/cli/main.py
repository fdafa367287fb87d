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
        purpose: heading of ``opensora --help``.
        help: one line.
        ranks: whether several processes may run it together.
    """

    module: str
    purpose: str
    help: str
    ranks: bool = False


SAMPLING, TRAINING, AUTOENCODERS, DATA, MACHINE = "videos", "training", "video autoencoders", "data", "this machine"
COMMANDS = {
    "generate": Command(
        "opensora.cli.generate", SAMPLING, "generate videos from prompts, pictures and clips", ranks=True
    ),
    "decode": Command("opensora.cli.decode", SAMPLING, "decode saved latents to videos"),
    "serve": Command("opensora.serving.command", SAMPLING, "serve a web page and OpenAI's videos API"),
    "train": Command("opensora.cli.train", TRAINING, "train the diffusion model", ranks=True),
    "cache": Command("opensora.cli.cache", TRAINING, "precompute latents and text embeddings"),
    "trajectories": Command(
        "opensora.cli.trajectories", TRAINING, "sample a teacher's trajectories for few-step distillation", ranks=True
    ),
    "train-vae": Command("opensora.cli.train_vae", AUTOENCODERS, "train a video autoencoder", ranks=True),
    "reconstruct": Command("opensora.cli.reconstruct", AUTOENCODERS, "reconstruct clips and measure the quality"),
    "vae-stats": Command(
        "opensora.cli.vae_stats", AUTOENCODERS, "compute latent statistics per channel, to paste into a config"
    ),
    "meta": Command("opensora.cli.meta", DATA, "add the length, size and frame rate of every clip to a table"),
    "shard": Command("opensora.cli.shard", DATA, "split a parquet table into shards"),
    "benchmark": Command(
        "opensora.cli.benchmark", MACHINE, "measure seconds per stage and step, peak memory and TFLOP/s"
    ),
    "doctor": Command("opensora.cli.doctor", MACHINE, "check the installation, and generate a small video"),
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
    groups: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        groups.setdefault(command.purpose, []).append(f"  {name:<{width}}  {command.help}")
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Train and run text- and image-to-video diffusion models.",
            *(line for purpose, lines in groups.items() for line in ("", f"{purpose}:", *lines)),
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command; {PROGRAM} --version prints the version.",
            "--nproc N starts N processes on this machine; across machines: torchrun ... -m opensora COMMAND ...",
            f"  ({ranks})",
            f"{DEBUG_FLAG} shows the traceback of an unexpected error.",
        ]
    )
