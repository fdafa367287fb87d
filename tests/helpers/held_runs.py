"""Training that is stopped from outside at a step, in a process of its own."""

import contextlib
import logging
from multiprocessing.connection import Connection

from opensora.config import parse_config
from opensora.config.commands import TrainOptions
from opensora.training.diffusion.trainer import Trainer


class Hold(logging.Handler):
    """Stops a run when its log shows a step, until the other end of a pipe is closed."""

    def __init__(self, step: int, gate: Connection) -> None:
        super().__init__()
        self.words, self.gate = f"step {step}/", gate

    def emit(self, record: logging.LogRecord) -> None:
        """Wait at the step."""
        if record.getMessage().startswith(self.words):
            with contextlib.suppress(EOFError):
                self.gate.recv()


def train(words: list[str], step: int, gate: Connection) -> None:
    """Train; however busy the machine is, the run is not past the step after ``step`` when it is sent a signal."""
    if step:
        logging.getLogger("opensora.training.report.metrics").addHandler(Hold(step + 1, gate))
    Trainer(parse_config(words, TrainOptions)).run()
