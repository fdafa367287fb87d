"""Checkpoint folders: found, read, removed.

They are written beside their place and renamed, and renamed before they are deleted: one that has its name is whole,
whenever the run is killed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files import remove_folder, remove_unfinished_files, remove_unfinished_folders
from opensora.utils.paths import read_text
from opensora.utils.weights import is_stored, load_state_dict, open_weights

STATES = "running_states.json"  # the last file to be written into a checkpoint
MOST = 2**63  # of a count of steps
FOLDER = re.compile(r"epoch(\d+)-global_step(\d+)")


@dataclass
class RunningStates:
    """Where a run stands: ``epoch`` and ``step`` (micro-batches into it) follow from the micro-steps done;
    ``global_step`` counts optimizer steps, ``skipped_steps`` those of them that changed nothing; ``replicas`` are the
    data-parallel ranks that each did these micro-steps; ``saved_at`` is when the checkpoint was written (seconds since
    1970), 0 if it does not say; ``discriminator_since`` is the optimizer step at which an autoencoder's discriminator
    began."""

    epoch: int
    step: int
    global_step: int
    micro_step: int
    ema_updates: int = 0
    skipped_steps: int = 0
    replicas: int = 1
    saved_at: float = 0.0
    discriminator_since: int = 0

    def move_to(self, replicas: int) -> None:
        """Count micro-steps as another number of data-parallel ranks does them: the place in the data stays."""
        self.micro_step = self.micro_step * self.replicas // replicas
        self.replicas = replicas

    def start_at(self, epoch: int | None, step: int | None, epoch_length: int) -> None:
        """Go on at another place in the data.

        Args:
            epoch, step: a config's ``start_epoch`` and ``start_step``; None keeps the present one.
            epoch_length: micro-batches per epoch.

        Raises:
            UserError: a negative place.
        """
        if epoch is None and step is None:
            return
        epoch = self.epoch if epoch is None else epoch
        step = self.step if step is None else step
        if epoch < 0 or step < 0:
            raise UserError(f"start_epoch={epoch}, start_step={step}: must not be negative")
        self.micro_step = epoch * epoch_length + step
        self.epoch, self.step = divmod(self.micro_step, epoch_length)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run was writing or deleting: checkpoints, sample videos."""
    remove_unfinished_files(folder)
    remove_unfinished_folders(folder, "epoch*-global_step*")


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of an experiment in the order in which they were written.

    That is not always the order of their steps: a run may have gone on from an older one, and what it has written since
    is newer than what it left behind.
    """
    found = [p for p in folder.glob("epoch*-global_step*") if FOLDER.fullmatch(p.name) and (p / STATES).is_file()]
    return sorted(found, key=lambda p: (_saved_at(p), int(p.name.rsplit("global_step", 1)[1])))


def _saved_at(checkpoint: Path) -> float:
    """See :class:`RunningStates`; 0 as well for what is not this program's."""
    try:
        return float(json.loads(read_text(checkpoint / STATES)).get("saved_at", 0))
    except (AttributeError, OSError, TypeError, ValueError):
        return 0.0


def remove_old_checkpoints(folder: Path, keep_n_latest: int) -> None:
    """Delete all but the newest ``keep_n_latest`` (at least one) checkpoints; negative keeps everything."""
    if keep_n_latest < 0:
        return
    for path in list_checkpoints(folder)[: -max(keep_n_latest, 1)]:
        remove_folder(path)


def find_checkpoint(load: str, outputs: str | Path) -> Path:
    """The folder that ``--load`` means: a checkpoint folder, an experiment folder, or ``latest`` (newest of all
    experiments below ``outputs``).

    Raises:
        UserError: nothing there; says what was looked for.
    """
    if load == "latest":
        candidates = [c for exp in Path(outputs).glob("*") if exp.is_dir() for c in list_checkpoints(exp)]
        if not candidates:
            raise UserError(f"--load latest: no checkpoint (epoch*-global_step*) below {outputs}")
        return max(candidates, key=lambda p: (_saved_at(p), (p / STATES).stat().st_mtime))
    path = Path(load)
    if (path / STATES).is_file():
        return path
    if path.is_dir() and list_checkpoints(path):
        return list_checkpoints(path)[-1]
    raise UserError(f"--load {load}: neither a checkpoint (a folder with running_states.json) nor one that holds some")


def load_states(checkpoint: Path) -> RunningStates:
    """Where the run of a checkpoint stood.

    Raises:
        UserError: it is not one of this program's.
    """
    try:
        states = RunningStates(**json.loads(read_text(checkpoint / STATES)))
        for key, value in vars(states).items():
            kind = int | float if key == "saved_at" else int
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < MOST:
                raise ValueError(f"{key}={value!r}")
        return states
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--load {checkpoint}: {STATES} is not of this program ({error}); to start from its weights alone, give "
            f"--ckpt-path {checkpoint}"
        ) from error


def load_part(checkpoint: Path, name: str) -> Any:
    """Optimizer state ``<name>/state.pt``, with the tensors of ``<name>/state.safetensors``."""
    state = torch.load(checkpoint / name / "state.pt", map_location="cpu", weights_only=True)
    tensors = checkpoint / name / "state.safetensors"
    if is_stored(tensors):
        for place, value in open_weights(tensors).tensors():
            index, key = place.split(".", 1)
            state["state"][int(index)][key] = value
    return state


def load_weights(checkpoint: Path, name: str = "model") -> dict[str, Tensor]:
    """Weights ``<name>/model.safetensors``, or ``<name>.safetensors`` for "ema" and "master", or shards of these.

    Tensors are views of the mapped files: what a rank does not use of them takes no memory.

    Raises:
        UserError: the checkpoint does not hold them.
    """
    file = checkpoint / (f"{name}.safetensors" if name in ("ema", "master") else f"{name}/model.safetensors")
    if not is_stored(file):
        hint = "; its run kept no EMA: resume with --ema-decay None, or start a new run from it with --ckpt-path"
        raise UserError(f"{checkpoint}: has no {file.relative_to(checkpoint)}{hint if name == 'ema' else ''}")
    return load_state_dict(file)
