"""Saving while a run goes on: in the foreground or beside training, keeping the newest, surviving a full disk."""

import shutil
import threading
from pathlib import Path

from opensora.training.checkpoint import CheckpointContent, remove_old_checkpoints, write_checkpoint
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run.

    A checkpoint that cannot be written (a full disk) is logged and the run goes on: the last good one is still there,
    and the next may succeed. Only the run's last checkpoint must succeed.

    Args:
        folder: experiment folder.
        keep_n_latest: checkpoints to keep; negative keeps all.
        asynchronous: copy to host memory, then write in a thread. At most one checkpoint is on its way.
    """

    def __init__(self, folder: Path, keep_n_latest: int = -1, asynchronous: bool = False) -> None:
        self.folder, self.keep_n_latest, self.asynchronous = folder, keep_n_latest, asynchronous
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, content: CheckpointContent, last: bool = False) -> Path:
        """Write a checkpoint, or start to.

        Args:
            content: what it holds.
            last: nothing comes after it: it is waited for, and must succeed.

        Returns:
            Its folder.

        Raises:
            UserError: the last one could not be written.
        """
        self.wait()
        if self.asynchronous and not last:
            self._thread = threading.Thread(target=self._write, args=(content.snapshot(),), name="checkpoint")
            self._thread.start()
        else:
            self._write(content)
            error = self._error
            self._report()
            if last and error is not None:
                raise UserError(f"the last checkpoint could not be written ({error})") from error
        return self.folder / f"epoch{content.states.epoch}-global_step{content.states.global_step}"

    def wait(self) -> None:
        """Wait for a checkpoint that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._report()

    def _write(self, content: CheckpointContent) -> None:
        try:
            path = write_checkpoint(self.folder, content)
            remove_old_checkpoints(self.folder, self.keep_n_latest)
            logger.info("saved %s", path)
        except OSError as error:
            self._error = error

    def _report(self) -> None:
        if self._error is not None:
            free = shutil.disk_usage(self.folder).free / 2**30
            logger.error(
                "no checkpoint was written: %s (%.1f GiB free); the run goes on, the checkpoints before are untouched",
                self._error,
                free,
            )
            self._error = None
