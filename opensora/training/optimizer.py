"""Optimizers and learning-rate schedules, both counted in optimizer steps."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from opensora.utils.errors import UserError

# One process trains with torch's AdamW under either name: HybridAdam is ColossalAI's AdamW for sharded training.
ADAM_NAMES = ("HybridAdam", "AdamW", "Adam")


def create_optimizer(parameters: Iterable[nn.Parameter], config: Mapping[str, Any]) -> Optimizer:
    """Optimizer over the trainable parameters.

    Args:
        parameters: those without ``requires_grad`` are left out.
        config: ``cls`` (HybridAdam or AdamW: decoupled decay; Adam), ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``adamw_mode`` (False: L2 penalty as in Adam).

    Raises:
        UserError: unknown ``cls`` or key.
    """
    options = dict(config)
    name = options.pop("cls", "HybridAdam")
    decoupled = options.pop("adamw_mode", name != "Adam")
    if name not in ADAM_NAMES:
        raise UserError(f"optim.cls={name!r} is unknown; use one of {', '.join(ADAM_NAMES)}")
    unknown = set(options) - {"lr", "betas", "eps", "weight_decay"}
    if unknown:
        raise UserError(f"optim.{sorted(unknown)[0]} is unknown; use lr, betas, eps, weight_decay, adamw_mode")
    options = {key: value for key, value in options.items() if value is not None}
    trainable = [p for p in parameters if p.requires_grad]
    return (AdamW if decoupled else torch.optim.Adam)(trainable, **options)


def create_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    cosine: bool = False,
    flat_share: float = 0.0,
    start_step: int = 0,
    initial_lr: float = 1e-6,
) -> LambdaLR:
    """Linear warm-up from ``initial_lr``, then constant, or constant for a share of the run and then a cosine to zero.

    Args:
        optimizer: its ``lr`` is the plateau.
        warmup_steps: length of the warm-up.
        total_steps: where the cosine ends; required with ``cosine``.
        cosine: decay after the plateau.
        flat_share: share of the steps after warm-up spent on the plateau before the cosine, in [0, 1).
        start_step: optimizer step to resume at.
        initial_lr: learning rate of the first warm-up step.
    """
    if cosine and total_steps is None:
        raise UserError("use_cosine_scheduler needs the length of the run: set max_steps or epochs")
    base = optimizer.param_groups[0]["lr"]
    flat_until = warmup_steps + flat_share * max((total_steps or 0) - warmup_steps, 0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            start = min(initial_lr / base, 1.0)
            return start + (1.0 - start) * (step + 1) / (warmup_steps + 1)
        if not cosine or total_steps is None or step < flat_until:
            return 1.0
        done = min((step - flat_until) / max(total_steps - flat_until, 1), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] if start_step == 0 else group.get("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=start_step - 1)
