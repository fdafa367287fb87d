"""Program of `test_failures`: all processes find one mistake; one finds another, or is killed, while others wait."""

import os
import signal
import sys

import torch
import torch.distributed as dist

from opensora.acceleration.failures import first_to_say, reported_once
from opensora.acceleration.parallel_context import launch
from opensora.config import run_main
from opensora.utils.errors import UserError


def main(argv: list[str] | None = None) -> None:
    if first_to_say("a mistake of all", os.environ):
        print("a mistake of all", file=sys.stderr)
    with reported_once(os.environ):
        launch(torch.device("cpu"))
        dist.barrier()
        if dist.get_rank() == 1 and "killed" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 1:
            raise UserError("a mistake of one")
        dist.barrier()


if __name__ == "__main__":
    run_main(main)
