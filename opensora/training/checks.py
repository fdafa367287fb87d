"""Checks of a training config that both trainers make before anything is built."""

from opensora.config.commands import LoopOptions
from opensora.training.weights.optimizer import WHOLE_MATRICES, check_package
from opensora.utils.errors import UserError


def check_loop(cfg: LoopOptions) -> None:
    """Refuse what no bound of a key of the training loop says.

    Raises:
        UserError: names the key and what would be right.
    """
    if cfg.keep_n_latest == 0:
        raise UserError("keep_n_latest=0: no checkpoint would stay; keep 1 or more, or all with -1")


def check_optimizer(cfg: LoopOptions, world_size: int) -> None:
    """See that the optimizer is installed, and can work on what a rank holds of the parameters.

    Raises:
        UserError: says what to install, or which plugin or optimizer to use.
    """
    check_package(cfg.optim.cls)
    if world_size == 1 or (cfg.plugin == "ddp" and cfg.plugin_config.tp_size == 1):
        return
    if cfg.optim.cls in WHOLE_MATRICES:
        raise UserError(
            f"optim.cls={cfg.optim.cls} needs whole matrices on every rank: use --plugin ddp, or --optim.cls AdamW "
            "under any plugin"
        )
