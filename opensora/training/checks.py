"""Checks of a training config that both trainers make before anything is built."""

from opensora.config.commands import LoopOptions
from opensora.training.checkpoint.folder import RunningStates
from opensora.utils.errors import UserError


def check_loop(cfg: LoopOptions) -> None:
    """Refuse what no bound of a key of the training loop says.

    Raises:
        UserError: names the key and what would be right.
    """
    if cfg.keep_n_latest == 0:
        raise UserError("keep_n_latest=0: no checkpoint would stay; keep 1 or more, or all with -1")


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
