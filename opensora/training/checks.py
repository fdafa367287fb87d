"""Checks of a training config that both trainers make before anything is built."""

from opensora.acceleration.plugins import NATIVE, check_in_backward
from opensora.config.commands import LoopOptions
from opensora.training.weights.optimizer import WHOLE_ROWS, check_settings
from opensora.utils.errors import UserError


def check_loop(cfg: LoopOptions) -> None:
    """Refuse what no bound of a key of the training loop says.

    Raises:
        UserError: names the key and what would be right.
    """
    if cfg.keep_n_latest == 0:
        raise UserError("keep_n_latest=0: no checkpoint would stay; keep 1 or more, or all with -1")


def check_optimizer(cfg: LoopOptions, world_size: int) -> None:
    """See that the optimizer can be made, and work on what a rank holds of the parameters.

    Raises:
        UserError: says what to install, or which plugin or optimizer to use.
    """
    check_settings(cfg.optim)
    if cfg.optim.in_backward:
        check_in_backward(world_size, cfg.grad_clip, cfg.accumulation_steps)
    if cfg.optim.states == "host" and world_size > 1:
        _check_host_states(cfg)
    if world_size == 1 or (cfg.plugin in NATIVE and cfg.plugin_config.tp_size == 1):
        return
    if cfg.optim.cls in WHOLE_ROWS:
        raise UserError(
            f"optim.cls={cfg.optim.cls} needs whole rows of every matrix: use --plugin fsdp2 or ddp without tp_size, "
            "or --optim.cls AdamW under any plugin"
        )


def _check_host_states(cfg: LoopOptions) -> None:
    """Raises a UserError where processes cannot keep optimizer states in host memory."""
    if cfg.plugin not in NATIVE or cfg.plugin_config.tp_size > 1:
        raise UserError(
            f"optim.states=host with plugin {cfg.plugin} and tp_size={cfg.plugin_config.tp_size}: use --plugin fsdp2, "
            "or ddp, without tp_size"
        )
    if (cfg.plugin, cfg.optim.cls) == ("fsdp2", "Muon"):
        raise UserError(
            "optim.states=host with plugin fsdp2 and Muon, where as many matrices are worked on at a time as there are "
            "ranks, while host states come to the device one by one: use states=device, or --optim.cls AdamW"
        )
