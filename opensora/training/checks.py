"""Checks of a training config that both trainers make before anything is built."""

from opensora.config.commands import LoopOptions
from opensora.utils.errors import UserError


def check_loop(cfg: LoopOptions) -> None:
    """Refuse what no bound of a key of the training loop says.

    Raises:
        UserError: names the key and what would be right.
    """
    if cfg.keep_n_latest == 0:
        raise UserError("keep_n_latest=0: no checkpoint would stay; keep 1 or more, or all with -1")
