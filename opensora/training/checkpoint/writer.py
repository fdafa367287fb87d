"""Saving during a run: in the foreground or beside training, keeping the newest, surviving a full disk."""

import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import time
from typing import Any

from safetensors import SafetensorError

from opensora.acceleration.collectives import gather_values
from opensora.acceleration.parallel_context import Axis
from opensora.training.checkpoint.content import (
    CheckpointContent,
    CheckpointFiles,
    HostCopies,
    Shard,
    as_they_are,
)
from opensora.training.checkpoint.folder import RunningStates, remove_old_checkpoints
from opensora.utils.errors import UserError
from opensora.utils.files import discard_folder, put_in_place, temporary_path
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

SHARD_BYTES = 4 * 2**30


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank makes one, and calls its methods in the same order.

    Ranks write different files, beside the checkpoint's place, into a folder that is renamed once all have succeeded:
    a checkpoint is whole or absent, whichever rank failed. One that cannot be written (a full disk) is logged and the
    run continues: the last good one is still there, and the next may succeed. Only the run's last checkpoint must
    succeed.

    Args:
        folder: experiment folder, which all ranks share.
        keep_n_latest: checkpoints to keep; negative keeps all.
        asynchronous: copy to host memory, which is kept, then write in a thread. At most one checkpoint is on its way;
            training waits for the copy alone, and at the next checkpoint for what is left of this one.
        ranks: all processes, with a group that nothing else uses meanwhile (`ParallelContext.host`).
        shard_bytes: files of tensors are divided above this size.
    """

    def __init__(
        self,
        folder: Path,
        keep_n_latest: int = -1,
        asynchronous: bool = False,
        ranks: Axis | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.keep_n_latest, self.asynchronous = folder, keep_n_latest, asynchronous
        self.ranks, self.shard_bytes = ranks or Axis(), shard_bytes
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._fault: Exception | None = None

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
        states, beside_training = replace(content.states, saved_at=time()), self.asynchronous and not last
        target = self.folder / f"epoch{states.epoch}-global_step{states.global_step}"
        to_host = self._copies if beside_training else as_they_are
        files = CheckpointFiles(content, self.ranks, self.shard_bytes, to_host)
        self._error = self._together(partial(self._begin, target))
        if self._error is None and beside_training:
            mine = [shard for shard in files.shards() if shard.tensors]
            self._copies.finish()
            arguments = (target, files, mine, states)
            self._thread = threading.Thread(target=self._finish_beside, args=arguments, name="checkpoint")
            self._thread.start()
            return target
        if self._error is None:
            self._finish(target, files, files.shards(), states)
        error = self._error
        self._report()
        if last and error is not None:
            raise UserError(f"the last checkpoint could not be written ({error})") from error
        return target

    def wait(self) -> None:
        """Wait for a checkpoint that is being written; what went wrong with it that is not about files is raised."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._fault is not None:
            raise self._fault
        self._report()

    def report(self) -> None:
        """Say, at the end of a step, what has become of a checkpoint that was written beside training; see `wait`,
        but nothing is waited for."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _finish_beside(self, *args: Any) -> None:
        """`_finish` in a thread, whose faults would pass unseen: the other ranks would wait for this one's files."""
        try:
            self._finish(*args)
        except Exception as fault:
            self._fault = fault

    def _begin(self, target: Path) -> None:
        if self.ranks.first:
            discard_folder(temporary_path(target, "writing"))
            temporary_path(target, "writing").mkdir(parents=True)

    def _finish(self, target: Path, files: CheckpointFiles, shards: Iterable[Shard], states: RunningStates) -> None:
        """Write this rank's shards, and once all ranks have, put the checkpoint in its place."""
        try:
            self._error = self._together(partial(_write, shards, temporary_path(target, "writing")))
            if self._error is None:
                self._error = self._together(partial(self._publish, target, files, states))
        except RuntimeError:  # of the exchange: another process has gone, and it says why
            self._discard(target)
            raise
        if self._error is not None:
            self._discard(target)

    def _discard(self, target: Path) -> None:
        if self.ranks.first:
            discard_folder(temporary_path(target, "writing"))

    def _publish(self, target: Path, files: CheckpointFiles, states: RunningStates) -> None:
        if not self.ranks.first:
            return
        files.complete(temporary_path(target, "writing"), states)
        put_in_place(temporary_path(target, "writing"), target)
        remove_old_checkpoints(self.folder, self.keep_n_latest)
        logger.info("saved %s", target)

    def _together(self, action: Callable[[], OSError | None]) -> OSError | None:
        """Run an action on every rank; all get the error of the first rank that has one."""
        error = _error_of(action)
        found = [text for text in gather_values(str(error) if error else None, self.ranks) if text is not None]
        return error or (OSError(found[0]) if found else None)

    def _report(self) -> None:
        if self._error is not None and self.ranks.first:
            free = shutil.disk_usage(self.folder).free / 2**30
            logger.error(
                "no checkpoint was written: %s (%.1f GiB free); the run continues, earlier checkpoints are untouched",
                self._error,
                free,
            )
        self._error = None


def _write(shards: Iterable[Shard], folder: Path) -> OSError | None:
    """Write the shards that have tensors, each in a thread while the next ones are put together: this takes all ranks,
    and none is to wait for another one's disk. After a failure the others are gone through still."""
    error, pending = None, None
    with ThreadPoolExecutor(1, "shards") as beside:
        for shard in shards:
            if not shard.tensors:
                continue
            error = error or (pending.result() if pending is not None else None)
            pending = beside.submit(_error_of, partial(shard.write, folder)) if error is None else None
        return error or (pending.result() if pending is not None else None)


def _error_of(action: Callable[[], OSError | None]) -> OSError | None:
    """What went wrong with files in an action, or what it returns."""
    try:
        return action()
    except OSError as error:
        return error
    except (SafetensorError, RuntimeError) as error:  # how the writers of tensors report a full disk
        return OSError(str(error))
