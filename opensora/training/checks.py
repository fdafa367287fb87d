"""Checks of a training config that both trainers make before anything is built."""

from typing import Any

from opensora.training.checkpoint.folder import RunningStates
from opensora.utils.errors import UserError, check_least

LEAST = {
    "accumulation_steps": 1,
    "epochs": 1,
    "max_steps": 1,
    "max_skipped_steps": 1,
    "ckpt_every": 0,
    "grad_clip": 0,
    "num_workers": 0,
    "prefetch_factor": 1,
}


def check_loop(cfg: Any) -> None:
    """Refuse numbers of the training loop (``LoopOptions``) that cannot be.

    Raises:
        UserError: names the key and what would be right.
    """
    check_least(cfg, LEAST)
    if cfg.ckpt_shard_size_gb <= 0:
        raise UserError(f"ckpt_shard_size_gb={cfg.ckpt_shard_size_gb}: must be more than 0")
    if cfg.ema_decay is not None and not 0 <= cfg.ema_decay < 1:
        raise UserError(f"ema_decay={cfg.ema_decay}: must lie in [0, 1); none keeps no average")


def check_unfinished(states: RunningStates, total_steps: int) -> None:
    """Refuse to go on from a checkpoint at or past the run's last optimizer step.

    Raises:
        UserError: names both steps.
    """
    if states.global_step >= total_steps:
        raise UserError(
            f"--load: the checkpoint is at step {states.global_step}, the run ends at {total_steps}; "
            "raise max_steps or epochs"
        )
