"""What every training run sets up first: its folder, log, device and precision."""

from datetime import datetime
from pathlib import Path
from typing import Any

from opensora.config import config_to_text
from opensora.training.checkpoint import remove_unfinished
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger, setup_logging

logger = get_logger(__name__)


def experiment_name(config_path: str) -> str:
    """``<yymmdd_HHMMSS>-<path below configs/ with underscores>``."""
    parts = Path(config_path).with_suffix("").parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    return f"{datetime.now():%y%m%d_%H%M%S}-{'_'.join(p for p in parts if p not in ('/', '.', '..'))}"


def create_experiment(cfg: Any, resume_from: Path | None) -> Path:
    """Make the run's folder, write ``config.txt`` and start ``log.txt``.

    A resumed run without ``exp_name`` goes on in the folder its checkpoint is in.

    Raises:
        UserError: the folder holds another run's checkpoints and this run does not go on from one of them.
    """
    if cfg.exp_name is None and resume_from is not None:
        folder = resume_from.resolve().parent
    else:
        folder = Path(cfg.outputs) / (cfg.exp_name or experiment_name(cfg.config_path))
    occupied = folder.is_dir() and any(folder.glob("epoch*-global_step*"))
    if occupied and (resume_from is None or resume_from.resolve().parent != folder.resolve()):
        raise UserError(f"{folder} already holds checkpoints: give another --exp-name, or go on with --load {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    (folder / "config.txt").write_text(config_to_text(cfg), encoding="utf-8")
    setup_logging(folder / "log.txt")
    logger.info("experiment folder: %s", folder)
    return folder
