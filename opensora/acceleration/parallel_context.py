"""Process groups of a run, as a value that is handed to whoever needs it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from opensora.acceleration.torchrun import Torchrun
from opensora.config.options import PluginOptions
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

AXES = ("dp", "branch", "sp", "tp")
TIMEOUT = timedelta(minutes=30)  # of any exchange: longer than a large checkpoint takes the first rank to write


@dataclass(frozen=True)
class Axis:
    """One axis of the grid of processes: the ranks that differ from this one in nothing else.

    Attributes:
        size: number of ranks.
        rank: place of this process, 0 to ``size - 1``.
        group: their process group; None where there is only one rank, and then nothing is ever exchanged.
    """

    size: int = 1
    rank: int = 0
    group: Any = field(default=None, repr=False)

    @classmethod
    def of_group(cls, group: Any) -> "Axis":
        """The axis of a process group that this process belongs to."""
        size = dist.get_world_size(group)
        return cls(size, dist.get_rank(group), group if size > 1 else None)

    @property
    def first(self) -> bool:
        """Whether this process speaks for the axis."""
        return self.rank == 0


@dataclass(frozen=True)
class Sizes:
    """Wanted sizes of the axes; the data-parallel one takes the ranks that are left.

    Attributes:
        tp: ranks that share each weight matrix.
        sp: ranks that share the tokens of a sample.
        branch: ranks that share the guidance branches of a sampling step.
        shard: ranks, of those that average their gradients, that divide weights; None is all of them.
    """

    tp: int = 1
    sp: int = 1
    branch: int = 1
    shard: int | None = None

    @classmethod
    def of(cls, plugin: str | None, config: PluginOptions | None) -> "Sizes":
        """Sizes that a config asks for: ``plugin`` and ``plugin_config``, which says nothing without a plugin.

        Raises:
            UserError: pipeline parallelism, or weights or tokens divided by a plugin that does not.
        """
        if config is None or plugin in (None, "", "none"):
            return cls()
        if config.pp_size != 1:
            raise UserError(f"plugin_config.pp_size={config.pp_size}: pipeline parallelism is not available")
        found = cls(config.tp_size, config.sp_size, config.branch_size, config.shard_size)
        if found.shard is not None and plugin != "fsdp2":
            raise UserError(f"plugin_config.shard_size={found.shard} is of fsdp2; plugin {plugin} has no use for it")
        if plugin in ("zero1", "zero2", "torch_ddp") and found != cls():
            raise UserError(
                f"plugin {plugin} only divides data; for plugin_config.tp_size or sp_size above 1 use hybrid "
                "(ColossalAI), ddp or fsdp2"
            )
        return found

    def fit(self, world_size: int) -> "Sizes":
        """The largest sizes not above these whose product divides ``world_size``; a change is logged.

        Raises:
            UserError: `shard` does not divide the ranks that average their gradients.
        """
        left, fitted = world_size, {}
        for name in ("tp", "sp", "branch"):
            wanted = getattr(self, name)
            fitted[name] = max(size for size in range(1, min(wanted, left) + 1) if left % size == 0)
            left //= fitted[name]
            if fitted[name] != wanted:
                logger.info(
                    "%s_size=%d asked for, %d used: there are %d processes (torchrun --nproc_per_node)",
                    name, wanted, fitted[name], world_size,
                )  # fmt: skip
        replicas = world_size // fitted["tp"]
        if self.shard is not None and world_size > 1 and replicas % self.shard:
            raise UserError(
                f"plugin_config.shard_size={self.shard} does not divide the {replicas} processes that share weights"
            )
        return Sizes(**fitted, shard=self.shard)


@dataclass(frozen=True)
class ParallelContext:
    """Place of this process in the grid (dp, branch, sp, tp); tp ranks are neighbours.

    Attributes:
        rank, world_size: of all processes.
        device: where this process works.
        dp: data parallel: different samples.
        branch: same samples, different guidance branches.
        sp: same samples, different tokens.
        tp: same samples, different parts of the weights.
        replica: dp, branch and sp together: the ranks that hold the same weights and average their gradients.
        shard, copies: replica in two, where weights are divided over neighbours only: these, and the ranks that hold
            the same share of them.
        sample: branch, sp and tp together: the ranks that work on the same samples.
        host: all processes, for what they exchange on the CPU: in a thread too, it does not get in the way of the other
            axes' exchanges, which on GPUs are of tensors there and of picklable values.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dp: Axis = Axis()
    branch: Axis = Axis()
    sp: Axis = Axis()
    tp: Axis = Axis()
    replica: Axis = Axis()
    shard: Axis = Axis()
    copies: Axis = Axis()
    sample: Axis = Axis()
    host: Axis = Axis()

    @classmethod
    def create(cls, sizes: Sizes, device: torch.device | None = None) -> "ParallelContext":
        """Groups of the processes that `launch` joined; one process needs no `launch`.

        Args:
            sizes: wanted ones, see `Sizes.fit`.
            device: where this process works, the CPU by default.
        """
        device = device or torch.device("cpu")
        world = dist.get_world_size() if dist.is_initialized() else 1
        sizes = sizes.fit(world)
        if world == 1:
            return cls(device=device)
        grid = torch.arange(world).reshape(-1, sizes.branch, sizes.sp, sizes.tp)
        groups = {name: grid.movedim(dim, -1).flatten(0, -2) for dim, name in enumerate(AXES)}
        groups |= {"replica": grid.flatten(0, 2).movedim(0, -1), "sample": grid.flatten(1)}
        if sizes.shard is not None:
            parts = grid.flatten(0, 2).movedim(0, -1).unflatten(-1, (-1, sizes.shard))  # [tp, copies, shard]
            groups |= {"shard": parts.flatten(0, 1), "copies": parts.movedim(1, -1).flatten(0, 1)}
        axes = _axes(groups, device)
        axes["host"] = Axis(world, dist.get_rank(), _host_group(device))
        context = cls(dist.get_rank(), world, device, **axes)
        logger.info("%d processes: %s", world, context.describe())
        return context

    def describe(self) -> str:
        """Sizes in words."""
        groups = f", weights divided over {self.shard.size}" if self.copies.size > 1 else ""
        return ", ".join(f"{name} {getattr(self, name).size}" for name in AXES) + groups

    @property
    def replica_mesh(self) -> DeviceMesh:
        """Mesh of the axis `replica`, of more than one rank: of one dimension, or of `copies` and `shard`."""
        if self.copies.size == 1:
            return DeviceMesh.from_group(self.replica.group, self.device.type)
        ranks = torch.tensor(dist.get_process_group_ranks(self.replica.group)).view(self.copies.size, self.shard.size)
        groups = [self.copies.group, self.shard.group]
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=("copies", "shard"))


def _axes(groups: Mapping[str, Tensor], device: torch.device) -> dict[str, Axis]:
    """Axes whose groups of ranks are the rows of these tables; every process makes all of them, in the same order.

    Axes of the same ranks share their group, and on GPUs it is one of NCCL alone: a group of gloo keeps a connection to
    each of its ranks open, and with one for each axis a large run is out of descriptors.
    """
    backend = "nccl" if device.type == "cuda" else None
    made: dict[tuple[int, ...], Any] = {}
    axes = {}
    for name, table in groups.items():
        for ranks in table.tolist():
            key = tuple(ranks)
            if len(ranks) > 1 and key not in made:
                made[key] = dist.new_group(ranks, timeout=TIMEOUT, backend=backend)
            if dist.get_rank() in ranks:
                axes[name] = Axis(len(ranks), ranks.index(dist.get_rank()), made.get(key))
    return axes


def _host_group(device: torch.device) -> Any:
    """Group of all processes for what they exchange on the CPU. On GPUs it is the one that they were joined by, whose
    half for the CPU has nothing else to do once a run has begun; on CPUs all exchanges go there, so it is another."""
    return dist.group.WORLD if device.type == "cuda" else dist.new_group(backend="gloo", timeout=TIMEOUT)


def launch(device: torch.device, timeout: timedelta = TIMEOUT) -> None:
    """Join the processes that torchrun started, of which this is one; nothing where they are joined already.

    Args:
        device: where this process works; NCCL on GPUs, gloo on CPUs.
        timeout: how long an exchange may take before this process gives up on the others.

    Raises:
        UserError: what torchrun says of the processes is not there.
    """
    if dist.is_initialized():
        return
    Torchrun.check_whole(os.environ)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timeout)


def shutdown() -> None:
    """Leave the groups at the end of a run; nothing where there are none.

    Not after an error: with NCCL it waits for the others, who may be waiting for this process in another exchange.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
