"""What every training run sets up first: its folder, log, device and precision."""

from datetime import datetime
from pathlib import Path
from typing import Any

from opensora.config import config_to_text
from opensora.training.checkpoint.folder import load_states, remove_unfinished
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger, setup_logging

logger = get_logger(__name__)


def experiment_name(config_path: str) -> str:
    """``<yymmdd_HHMMSS>-<path below configs/ with underscores>``."""
    parts = Path(config_path).with_suffix("").parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    return f"{datetime.now():%y%m%d_%H%M%S}-{'_'.join(p for p in parts if p not in ('/', '.', '..'))}"


def experiment_folder(cfg: Any, resume_from: Path | None) -> Path:
    """Where a run's results go; one that is resumed without ``exp_name`` goes on where its checkpoint is.

    Raises:
        UserError: the folder holds another run's checkpoints and this run does not go on from one of them.
    """
    if cfg.exp_name is None and resume_from is not None:
        return resume_from.resolve().parent
    folder = Path(cfg.outputs) / (cfg.exp_name or experiment_name(cfg.config_path))
    occupied = folder.is_dir() and any(folder.glob("epoch*-global_step*"))
    if occupied and (resume_from is None or resume_from.resolve().parent != folder.resolve()):
        raise UserError(f"{folder} already holds checkpoints: give another --exp-name, or go on with --load {folder}")
    return folder


def create_experiment(cfg: Any, resume_from: Path | None) -> Path:
    """Make the run's folder, write ``config.txt`` and start ``log.txt``.

    A ``config.txt`` that says something else is kept as ``config_to_stepN.txt``, N being where the run goes on.

    Raises:
        UserError: see :func:`experiment_folder`.
    """
    folder = experiment_folder(cfg, resume_from)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    text, config = config_to_text(cfg), folder / "config.txt"
    if resume_from is not None and config.is_file() and config.read_text(encoding="utf-8") != text:
        kept = folder / f"config_to_step{load_states(resume_from).global_step}.txt"
        if not kept.exists():  # otherwise it is the one of a second try from the same checkpoint
            config.rename(kept)
    config.write_text(text, encoding="utf-8")
    setup_logging(folder / "log.txt")
    logger.info("experiment folder: %s", folder)
    return folder
