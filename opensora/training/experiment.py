"""What every training run sets up first: its folder, log, device and precision."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.rank_zero import from_rank_zero
from opensora.config import config_to_text
from opensora.config.commands import TrainOptions, VaeTrainOptions
from opensora.training.checkpoint.folder import list_checkpoints, load_states, remove_unfinished
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside, write_text
from opensora.utils.logging import get_logger, setup_logging

logger = get_logger(__name__)


def experiment_name(config_path: str) -> str:
    """``<yymmdd_HHMMSS>-<path below configs/ with underscores>``."""
    parts = Path(config_path).with_suffix("").parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    return f"{datetime.now():%y%m%d_%H%M%S}-{'_'.join(p for p in parts if p not in ('/', '.', '..'))}"


def experiment_folder(cfg: TrainOptions | VaeTrainOptions, resume_from: Path | None) -> Path:
    """Where a run's results go; one that is resumed without ``exp_name`` continues where its checkpoint is.

    Raises:
        UserError: the folder holds another run's checkpoints and this run does not resume from one of them.
    """
    if cfg.exp_name is None and resume_from is not None:
        return resume_from.resolve().parent
    folder = Path(cfg.outputs) / (cfg.exp_name or experiment_name(cfg.config_path))
    _check_free(folder, resume_from)
    return folder


def newest_of_experiment(cfg: TrainOptions | VaeTrainOptions) -> Path | None:
    """The newest checkpoint of the run that ``exp_name`` names, None before there is one.

    Raises:
        UserError: there is no ``exp_name``.
    """
    if cfg.exp_name is None:
        raise UserError("--resume auto needs --exp-name: the name by which a run finds what it has done before")
    return next(reversed(list_checkpoints(Path(cfg.outputs) / cfg.exp_name)), None)


def _check_free(folder: Path, resume_from: Path | None) -> None:
    found = next(folder.glob("epoch*-global_step*"), None) if folder.is_dir() else None
    if found is not None and (resume_from is None or resume_from.resolve().parent != folder.resolve()):
        if not list_checkpoints(folder):
            raise UserError(f"{found} is no whole checkpoint: move it away, or give another --exp-name")
        raise UserError(f"{folder} already holds checkpoints: give another --exp-name, or resume with --load {folder}")


@contextmanager
def claimed_experiment(
    cfg: TrainOptions | VaeTrainOptions, resume_from: Path | None, parallel: ParallelContext
) -> Iterator[Path]:
    """Within it, no other process writes into the run's folder, which it gives.

    Raises:
        UserError: on every rank: another process does, or see :func:`experiment_folder`.
    """
    with ExitStack() as held:

        def take() -> Path:
            folder = experiment_folder(cfg, resume_from)
            advice = "--wait True waits for it, another --exp-name writes elsewhere"
            held.enter_context(claimed(folder, wait=cfg.wait, advice=advice))
            _check_free(folder, resume_from)  # again: the other one may have written what we waited for
            if cfg.resume and newest_of_experiment(cfg) not in (None, resume_from):
                raise UserError(f"{folder}: another process has resumed it meanwhile; start again to resume from there")
            return folder

        yield from_rank_zero(take, parallel.device, parallel.rank, parallel.world_size)


def create_experiment(cfg: TrainOptions | VaeTrainOptions, resume_from: Path | None, folder: Path) -> None:
    """Write ``config.txt`` into the run's folder and start ``log.txt``.

    A ``config.txt`` that says something else is kept as ``config_to_stepN.txt``, N being where the run resumes (0 for
    one that begins).
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    text, config = config_to_text(cfg), folder / "config.txt"
    if config.is_file() and config.read_text(encoding="utf-8", errors="replace") != text:
        step = load_states(resume_from).global_step if resume_from is not None else 0
        kept = folder / f"config_to_step{step}.txt"
        if not kept.exists():  # otherwise it is the one of a second try from the same checkpoint
            write_beside(kept, partial(shutil.copyfile, config))  # config.txt stays until the new one is there
    write_text(text, config)
    setup_logging(folder / "log.txt")
    logger.info("experiment folder: %s", folder)
