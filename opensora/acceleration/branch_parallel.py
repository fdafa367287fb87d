"""Guidance branches of a sampling step on different ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis

Row = TypeVar("Row")


def own_rows(rows: Sequence[Row], axis: Axis) -> list[Row]:
    """Those of the branches that this rank makes."""
    return list(rows) if axis.group is None else list(rows[axis.rank :: axis.size])


def spread_branches(
    rows: Sequence[Row], predict: Callable[[list[Row]], list[Tensor]], like: Tensor, axis: Axis
) -> list[Tensor]:
    """Predictions of all branches, each made on one rank and then known to all.

    Args:
        rows: inputs of the branches, the same on every rank.
        predict: one float32 prediction per row, shaped like ``like``.
        like: ``[B, L, C]``.
        axis: the ranks; branch i is made by rank i modulo their number, so a step of one branch keeps one rank busy.
    """
    if axis.group is None:
        return predict(list(rows))
    mine = own_rows(rows, axis)
    made = predict(mine) if mine else []
    room = -(-len(rows) // axis.size)
    sent = torch.stack([*made, *[torch.zeros_like(like, dtype=torch.float32)] * (room - len(made))])
    received = collectives.all_gather(sent[None], axis)  # [ranks, room, B, L, C]
    return [received[i % axis.size, i // axis.size] for i in range(len(rows))]
