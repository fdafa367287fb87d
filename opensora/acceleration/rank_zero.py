"""What several processes of one run agree on."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from opensora.acceleration.parallel_context import launch
from opensora.utils.errors import UserError

Value = TypeVar("Value")

# The others wait here while rank 0 asks a language model about every prompt.
PATIENCE = datetime.timedelta(days=1)


def from_rank_zero(make: Callable[[], Value], device: torch.device, rank: int, world_size: int) -> Value:
    """Have rank 0 work a value out, and every rank get it.

    The processes are joined if they are not yet. Without further processes this is just a call.

    Args:
        make: only called by rank 0; its value must be picklable.
        device: where this process works.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: on every rank, if ``make`` raised one.
    """
    if world_size == 1:
        return make()
    launch(device, PATIENCE)
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
