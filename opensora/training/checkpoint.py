"""Checkpoint folders: written beside and renamed, so a folder that exists is whole."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import save_safetensors

logger = get_logger(__name__)

FOLDER = re.compile(r"epoch(\d+)-global_step(\d+)")


@dataclass
class RunningStates:
    """Where a run stands: ``epoch`` and ``step`` (micro-batches into it) follow from the micro-steps done;
    ``global_step`` counts optimizer steps, ``skipped_steps`` those of them that changed nothing; ``replicas`` are the
    data-parallel ranks that each did these micro-steps."""

    epoch: int
    step: int
    global_step: int
    micro_step: int
    ema_updates: int = 0
    skipped_steps: int = 0
    replicas: int = 1

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


@dataclass
class CheckpointContent:
    """Everything that a checkpoint holds.

    Attributes:
        states: where the run stands.
        model: weights; ``model/model.safetensors``, or an adapter's, see ``write_adapter_config``.
        optimizers: state dicts by name; ``<name>/state.pt``.
        ema: averaged weights; ``ema.safetensors``.
        extra_models: further weights by name; ``<name>/model.safetensors``.
        metadata: strings for the header of the weight files (layouts).
        master: fp32 copies of the weights; ``master.safetensors``.
        write_adapter_config: writes ``adapter_config.json`` into a folder. With it, ``model`` and ``ema`` are a LoRA
            adapter's weights and become the PEFT folders ``lora`` and ``lora_ema``.
    """

    states: RunningStates
    model: Mapping[str, Tensor]
    optimizers: Mapping[str, Any]
    ema: Mapping[str, Tensor] | None = None
    extra_models: Mapping[str, Mapping[str, Tensor]] | None = None
    metadata: Mapping[str, str] | None = None
    master: Mapping[str, Tensor] | None = None
    write_adapter_config: Callable[[Path], None] | None = None

    def snapshot(self) -> "CheckpointContent":
        """A copy in host memory that training does not change."""
        return replace(
            self,
            states=replace(self.states),
            **{
                name: _to_host(getattr(self, name)) for name in ("model", "optimizers", "ema", "extra_models", "master")
            },
        )

    def weight_files(self) -> dict[str, Mapping[str, Tensor]]:
        """Weight files by their place in the folder."""
        files: dict[str, Mapping[str, Tensor]] = {
            f"{name}/model.safetensors": weights for name, weights in (self.extra_models or {}).items()
        }
        if self.write_adapter_config is None:
            files["model/model.safetensors"] = self.model
        else:
            files["lora/adapter_model.safetensors"] = self.model
        if self.ema is not None:
            adapter = self.write_adapter_config is not None
            files["lora_ema/adapter_model.safetensors" if adapter else "ema.safetensors"] = self.ema
        if self.master:
            files["master.safetensors"] = self.master
        return files


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value


def save_checkpoint(
    folder: Path, states: RunningStates, model: Mapping[str, Tensor], *, optimizers: Mapping[str, Any], **more: Any
) -> Path:
    """Write ``<folder>/epoch{E}-global_step{S}``; arguments as in :class:`CheckpointContent`.

    Returns:
        The finished folder.
    """
    return write_checkpoint(folder, CheckpointContent(states, model, optimizers, **more))


def write_checkpoint(folder: Path, content: CheckpointContent) -> Path:
    """Write a checkpoint beside its place, then rename it: the folder is whole or absent, even if the disk is full.

    Returns:
        The finished folder.

    Raises:
        OSError: it could not be written; what was there before is as it was.
    """
    states = content.states
    target = folder / f"epoch{states.epoch}-global_step{states.global_step}"
    beside = folder / f".{target.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, weights in content.weight_files().items():
            (beside / name).parent.mkdir(exist_ok=True)
            save_safetensors(weights, beside / name, dict(content.metadata or {}))
            if content.write_adapter_config is not None and name.startswith("lora"):
                content.write_adapter_config((beside / name).parent)
        for name, state in content.optimizers.items():
            (beside / name).mkdir(exist_ok=True)
            torch.save(state, beside / name / "state.pt")
        (beside / "running_states.json").write_text(json.dumps(asdict(states), indent=4), encoding="utf-8")
        for file in beside.rglob("*"):
            _flush(file)
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, SafetensorError | RuntimeError):  # how the writers of tensors report a full disk
            raise OSError(f"{target}: {error}") from error
        raise
    return target


def _flush(file: Path) -> None:
    """Have the system write a file out, so that a machine that goes down does not leave an empty one."""
    if file.is_file():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run was writing."""
    for path in folder.glob(".epoch*-global_step*.writing"):
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of an experiment, oldest first."""
    found = [p for p in folder.glob("epoch*-global_step*") if FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rsplit("global_step", 1)[1]))


def remove_old_checkpoints(folder: Path, keep_n_latest: int) -> None:
    """Delete all but the newest ``keep_n_latest`` checkpoints; negative keeps everything."""
    if keep_n_latest < 0:
        return
    for path in list_checkpoints(folder)[: -keep_n_latest or None]:
        shutil.rmtree(path)


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
        return max(candidates, key=lambda p: (p / "running_states.json").stat().st_mtime)
    path = Path(load)
    if (path / "running_states.json").is_file():
        return path
    if path.is_dir() and list_checkpoints(path):
        return list_checkpoints(path)[-1]
    raise UserError(f"--load {load}: neither a checkpoint (a folder with running_states.json) nor one that holds some")


def load_states(checkpoint: Path) -> RunningStates:
    """Where the run of a checkpoint stood."""
    return RunningStates(**json.loads((checkpoint / "running_states.json").read_text(encoding="utf-8")))


def load_part(checkpoint: Path, name: str) -> Any:
    """Optimizer-like state ``<name>/state.pt``."""
    return torch.load(checkpoint / name / "state.pt", map_location="cpu", weights_only=True)


def load_weights(checkpoint: Path, name: str = "model") -> dict[str, Tensor]:
    """Weights ``<name>/model.safetensors``, or ``<name>.safetensors`` for "ema" and "master".

    Raises:
        UserError: the checkpoint does not hold them.
    """
    file = checkpoint / (f"{name}.safetensors" if name in ("ema", "master") else f"{name}/model.safetensors")
    if not file.is_file():
        raise UserError(f"{checkpoint}: has no {file.relative_to(checkpoint)}")
    return load_file(file)
