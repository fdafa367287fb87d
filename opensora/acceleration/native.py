"""Engines of torch itself: replicated weights (DDP) and sharded weights (FSDP2)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from opensora.acceleration import collectives
from opensora.acceleration.engine import SingleEngine
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.sharding import Gathered, WeightLayout
from opensora.utils.errors import UserError

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
"""From named parameters to an optimizer."""


Named = Sequence[tuple[str, nn.Parameter]]


class DistributedEngine(SingleEngine):
    """What the engines share: norms and checkpoints.

    Args:
        model: what a forward pass calls.
        plain: the model inside of it.
        named: what is optimised, by the model's names: its parameters, or fp32 copies of them.
        make_optimizer: over those.
        max_norm: limit of the gradient norm, 0 for none.
        context: the ranks.
        layout: tensor parallelism of the model.
    """

    def __init__(
        self, model: nn.Module, plain: nn.Module, named: Named, make_optimizer: OptimizerFactory,
        max_norm: float, context: ParallelContext, layout: WeightLayout,
    ) -> None:  # fmt: skip
        super().__init__(model, make_optimizer(named), max_norm)
        self.context, self.layout, self._plain = context, layout, plain
        self.ranks = context.host
        names = {id(parameter): name for name, parameter in named}
        self._names = [names[id(parameter)] for parameter in self._parameters]

    def unwrap(self) -> nn.Module:
        return self._plain

    def _clip(self) -> float:
        """The norm counts every weight once, wherever its parts are."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.context.device)  # divided over tp, and not
        grads = [(name, p.grad) for name, p in zip(self._names, self._parameters) if p.grad is not None]
        for divided in (True, False):
            norm = torch.nn.utils.get_total_norm([g for name, g in grads if (name in self.layout.splits) == divided])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            squares[int(not divided)] = norm.double().square()
        squares[:1] = collectives.all_reduce(squares[:1].clone(), self.context.tp)
        norm_of_all = float(squares.sum().sqrt())
        if 0 < self.max_norm < norm_of_all:
            for _, grad in grads:
                (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(self.max_norm / (norm_of_all + 1e-6))
        return norm_of_all

    def gather(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Gathered(state, self.layout.whole)

    def scatter(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        own = self._plain.state_dict() if like is None else like
        return Gathered(state, lambda name, value: self.layout.local(name, value, own.get(name, value)))

    def state_dict(self) -> Mapping[str, Any]:
        return self._whole_state(self.optimizer.state_dict())

    def _whole_state(self, own: Mapping[str, Any]) -> Mapping[str, Any]:
        """What one process would have saved, of an optimizer's state as this rank has it."""
        whole = {
            index: Gathered(values, partial(self._whole_value, self._names[index]))
            for index, values in sorted(own["state"].items())  # one order on all ranks
        }
        return {**own, "state": whole}

    def _whole_value(self, name: str, key: str, value: Any) -> Any:
        """The whole of an entry of the optimizer's state of a parameter."""
        if not isinstance(value, Tensor):
            return value
        whole = self.layout.whole(name, value)
        return whole.flatten() if key in getattr(self.optimizer, "flat_entries", ()) else whole

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(self._local_state(state))

    def _local_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of an optimizer's state."""
        local: dict[int, dict[str, Any]] = {}
        changed = getattr(self.optimizer, "from_whole", lambda parameter, values: values)
        for index, values in state["state"].items():
            parameter = self._parameters[index]
            local[index] = {
                key: self.layout.local(self._names[index], value, parameter)
                if isinstance(value, Tensor) and value.ndim
                else value
                for key, value in changed(parameter, values).items()
            }
        return {"state": local, "param_groups": state["param_groups"]}

    def on_any_rank(self, flag: bool) -> bool:
        flags = torch.tensor([float(flag)], device=self.context.device)
        if self.context.world_size > 1:
            dist.all_reduce(flags)
        return bool(flags.item())


class DDPEngine(DistributedEngine):
    """Weights on every rank, gradients averaged.

    That happens while the backward pass runs (torch's DDP, arXiv:2006.15704); with fp32 copies of the parameters, into
    which their gradients move as they arise, at the step.

    Args:
        model: see `DistributedEngine`.
        make_optimizer: called once.
        context: the ranks.
        max_norm: limit of the gradient norm, 0 for none.
        layout: tensor parallelism of the model.
        masters: fp32 copies of the parameters by name, if the optimizer is to work on them.
    """

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerFactory, context: ParallelContext,
        max_norm: float = 0.0, layout: WeightLayout | None = None, masters: Named | None = None,
    ) -> None:  # fmt: skip
        wrapped = model
        self._at_step = masters is not None
        if context.replica.group is not None and not self._at_step:
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            # which are the same everywhere, and may be of types that cannot be sent
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
            wrapped = DistributedDataParallel(model, process_group=context.replica.group)
        named = [*model.named_parameters()] if masters is None else masters
        super().__init__(wrapped, model, named, make_optimizer, max_norm, context, layout or WeightLayout())

    def no_sync(self) -> AbstractContextManager:
        wrapped: Any = self.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else super().no_sync()

    def step(self) -> float:
        if self._at_step:
            collectives.average([p.grad for p in self._parameters if p.grad is not None], self.context.replica)
        return super().step()


class FSDP2Engine(DistributedEngine):
    """Weights, gradients and optimizer states divided over ranks, block by block (arXiv:2304.11277).

    Parameters are float32 masters; the forward and backward pass see them in ``dtype``. With ``adapters`` these alone
    are: the frozen weights are divided as they are, quantised ones too, and float32 adapters are used as they are.

    Gradients are averaged over ranks in float32. Those of accumulated micro-batches are kept divided too: every
    backward pass reduces them, which moves as much as one without accumulation; between groups that hold the same
    share (`ParallelContext.copies`) they are averaged once per step. With ``whole_gradients`` all that happens once
    per step, and every rank keeps whole float32 gradients until then: 4 bytes a weight.

    A model on meta is divided as it is; ``fill`` then gives it its weights (see `materialise`).
    """

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerFactory, context: ParallelContext,
        max_norm: float = 0.0, layout: WeightLayout | None = None,
        dtype: torch.dtype = torch.float32, reshard_after_forward: bool = True, adapters: bool = False,
        whole_gradients: bool = False, fill: Callable[[nn.Module], None] | None = None,
    ) -> None:  # fmt: skip
        if not adapters:
            model.float()
        if context.replica.group is not None:
            # inputs keep their dtypes: rotary tables are float32 in every model
            computed_in = None if adapters and dtype == torch.float32 else dtype
            policy = MixedPrecisionPolicy(computed_in, torch.float32, cast_forward_inputs=False)
            options: dict[str, Any] = dict(
                mesh=context.replica_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
            )
            # FSDP hangs its backward on the output, and warns of views, which could be changed under it
            model.register_forward_hook(lambda module, args, out: out.clone() if out._is_view() else out)
            for name in ("double_blocks", "single_blocks", "blocks"):
                group = getattr(model, name, None)
                for block in group if isinstance(group, nn.ModuleList) else ():
                    fully_shard(block, **options)
            fully_shard(model, **options)
        elif dtype != torch.float32:
            raise UserError("plugin fsdp2: all ranks are tensor parallel, none is left to divide weights over; use ddp")
        if fill is not None:
            fill(model)
        named = [*model.named_parameters()]
        super().__init__(model, model, named, make_optimizer, max_norm, context, layout or WeightLayout())
        self.rounded_to = dtype if dtype != torch.float32 and not adapters else None
        self.whole_gradients = whole_gradients

    def master_state(self) -> Mapping[str, Tensor]:
        return self.gather(self._plain.state_dict()) if self.rounded_to is not None else {}

    def load_master_state(self, state: Mapping[str, Tensor]) -> None:
        if self.rounded_to is not None:
            self.layout.load(self._plain, state)

    @contextmanager
    def _waiting(self, exchange: Callable[[bool], None]) -> Iterator[None]:
        """Leave out an exchange of gradients inside the block."""
        exchange(False)
        try:
            yield
        finally:
            exchange(True)

    def no_sync(self) -> AbstractContextManager:
        model: Any = self.model
        if not isinstance(self.model, FSDPModule):
            return super().no_sync()
        if self.whole_gradients:
            return self._waiting(model.set_requires_gradient_sync)
        return self._waiting(model.set_requires_all_reduce) if self.context.copies.size > 1 else super().no_sync()
