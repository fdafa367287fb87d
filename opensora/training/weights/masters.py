"""fp32 master weights of a model that computes in bf16.

A bf16 weight has 8 bits of precision: an update smaller than 1/256 of it is lost. The optimizer therefore works on a
copy in fp32, and the model gets its rounded values after each step (arXiv:1710.03740). Gradients are collected in fp32
as they arise, so that accumulation and clipping are in fp32 too.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opensora.acceleration.native import OptimizerFactory
from opensora.config.options import OptimOptions
from opensora.training.weights.host import HostCopies, OneByOne
from opensora.training.weights.optimizer import create_optimizer


class MasterWeights:
    """fp32 copies of the trainable parameters that have another dtype.

    Args:
        model: its gradients are moved to the copies from now on.
        rounded_to: dtype that trainable fp32 parameters get now, in place; their copies keep what is lost. None leaves
            them.
        host: keep the copies in host memory, see :class:`opensora.training.weights.host.HostCopies`.
    """

    def __init__(self, model: nn.Module, rounded_to: torch.dtype | None = None, host: bool = False) -> None:
        self.host = HostCopies() if host else None
        self._model: dict[str, nn.Parameter] = {}
        self._master: dict[str, nn.Parameter] = {}
        self._trainable: list[tuple[str, nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32 and rounded_to is None:
                self._trainable.append((name, parameter))
                continue
            master = nn.Parameter(parameter.detach().float()) if self.host is None else self.host.add(parameter)
            if rounded_to is not None:
                parameter.data = parameter.data.to(rounded_to)
            self._model[name], self._master[name] = parameter, master
            self._trainable.append((name, master))
            parameter.register_post_accumulate_grad_hook(_mover(master))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer works on, in the model's order: the copies, and the parameters that need none."""
        return list(self._trainable)

    def attach(self, optimizer: Optimizer) -> None:
        """From now on every step of the optimizer is carried over to the model."""
        if isinstance(optimizer, OneByOne):
            optimizer.carry_over(dict(zip(self._master.values(), self._model.values())))
        else:
            optimizer.register_step_post_hook(lambda *_: self.copy_to_model())

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the model the rounded values."""
        if self._master:
            torch._foreach_copy_(list(self._model.values()), list(self.state_dict().values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The copies under the model's names."""
        if self.host is not None:
            return {name: self.host.of[master] for name, master in self._master.items()}
        return {name: master.detach() for name, master in self._master.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved copies. Weights that were frozen when they were saved have none there: they were never
        more exact than the model has them."""
        for name, master in self.state_dict().items():
            if name in state:
                master.copy_(state[name])
        self.copy_to_model()


def optimizer_factory(optim: OptimOptions, masters: MasterWeights | None) -> OptimizerFactory:
    """Maker of a config's optimizer (see `create_optimizer`) whose steps reach the model if there are copies."""

    def make(named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        named = [*named]
        optimizer, host = create_optimizer(named, optim), optim.states == "host"
        if host or optim.in_backward:
            copies = masters.host if masters is not None else None
            optimizer = OneByOne(optimizer, named[0][1].device, host, copies)
        if masters is not None:
            masters.attach(optimizer)
        return optimizer

    return make


def _mover(master: nn.Parameter):
    """Hook that adds a parameter's finished gradient to that of its copy."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return move
