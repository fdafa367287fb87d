"""The groups that a run's processes open, which are many where processes are."""

from types import SimpleNamespace

import pytest
import torch

from opensora.acceleration import parallel_context
from opensora.acceleration.parallel_context import ParallelContext, Sizes


@pytest.fixture
def opened(monkeypatch):
    """Groups that a process of eight opens on a device: (ranks, backend), in order; and its context."""

    def of(rank: int, device: str, **sizes: int) -> tuple[list, ParallelContext]:
        found = []

        def new_group(ranks=None, timeout=None, backend=None):
            found.append((ranks, backend))
            return f"group {len(found)}"

        fake = SimpleNamespace(
            new_group=new_group, is_initialized=lambda: True, get_world_size=lambda: 8, get_rank=lambda: rank,
            group=SimpleNamespace(WORLD="world"),
        )  # fmt: skip
        monkeypatch.setattr(parallel_context, "dist", fake)
        return found, ParallelContext.create(Sizes(**sizes), torch.device(device))

    return of


@pytest.mark.parametrize("sizes", [{}, {"sp": 2}, {"tp": 2, "sp": 2}, {"shard": 4}, {"sp": 8}])
def test_gpus_open_no_group_of_gloo_but_the_one_that_joined_them(opened, sizes):
    """A group of gloo is a connection to each of its ranks: with one per axis 256 ranks are out of descriptors."""
    found = [opened(rank, "cuda", **sizes) for rank in range(8)]
    assert all(groups == found[0][0] for groups, _ in found), "all processes open the same groups in the same order"
    assert {backend for _, backend in found[0][0]} == {"nccl"}
    assert {context.host.group for _, context in found} == {"world"}
    assert [context.host.rank for _, context in found] == [*range(8)]


def test_axes_of_the_same_ranks_share_their_group(opened):
    groups, context = opened(3, "cuda", shard=2)
    ranks = [tuple(of) for of, _ in groups]
    assert len(set(ranks)) == len(ranks)
    assert context.dp.group == context.replica.group == "group 1"
    assert (context.shard.size, context.shard.rank, context.copies.size) == (2, 1, 4)
    groups, context = opened(0, "cpu")
    assert groups == [([*range(8)], None), (None, "gloo")], "on a CPU what is exchanged beside training has its own"
    assert context.host.group != context.dp.group
    assert context.sample.group is None
