"""Checkpoint folders: written beside and renamed, so a folder that exists is whole."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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
    ``global_step`` counts optimizer steps."""

    epoch: int
    step: int
    global_step: int
    micro_step: int
    ema_updates: int = 0


def save_checkpoint(
    folder: Path,
    states: RunningStates,
    model: Mapping[str, Tensor],
    *,
    optimizers: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    extra_models: Mapping[str, Mapping[str, Tensor]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``<folder>/epoch{E}-global_step{S}``.

    Args:
        folder: experiment folder.
        states: where the run stands.
        model: weights; written to ``model/model.safetensors``.
        optimizers: state dicts by name; written to ``<name>/state.pt``.
        ema: averaged weights; written to ``ema.safetensors``.
        extra_models: further weights by name; written to ``<name>/model.safetensors``.
        metadata: strings for the header of the weight files (layouts).

    Returns:
        The finished folder.
    """
    target = folder / f"epoch{states.epoch}-global_step{states.global_step}"
    beside = folder / f".{target.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for name, weights in {"model": model, **(extra_models or {})}.items():
            (beside / name).mkdir(parents=True)
            save_safetensors(weights, beside / name / "model.safetensors", dict(metadata or {}))
        if ema is not None:
            save_safetensors(ema, beside / "ema.safetensors", dict(metadata or {}))
        for name, state in optimizers.items():
            (beside / name).mkdir(exist_ok=True)
            torch.save(state, beside / name / "state.pt")
        (beside / "running_states.json").write_text(json.dumps(asdict(states), indent=4), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


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
    """Weights ``<name>/model.safetensors``, or ``ema.safetensors`` for "ema"."""
    file = checkpoint / "ema.safetensors" if name == "ema" else checkpoint / name / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{checkpoint}: has no {file.relative_to(checkpoint)}")
    return load_file(file)
