"""Optimizer states, and fp32 copies of weights, in host memory: they come to the device when a parameter is updated.

One parameter is updated at a time, by whatever optimizer, on the device; so the numbers are the optimizer's own. On a
GPU copies run on streams of their own, from and to pinned memory, beside the update of the parameter before.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from opensora.acceleration.sharding import Gathered
from opensora.training.weights.eight_bits import divided_like

SLAB = 1 << 30  # bytes; pinned memory is given out in powers of two, which would waste a third of it


class HostMemory:
    """Room for tensors in host memory, pinned where a GPU reads it.

    Args:
        device: what the tensors work on.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def room_for(self, like: Tensor) -> Tensor:
        """Room for a tensor of this shape and dtype."""
        if not self.pinned:
            return torch.empty(like.shape, dtype=like.dtype)
        size = like.numel() * like.element_size()
        if self._used + size > self._slab.numel():
            self._slab, self._used = torch.empty(max(size, SLAB), dtype=torch.uint8, pin_memory=True), 0
        piece = self._slab[self._used : self._used + size]
        self._used += -(-size // 256) * 256
        return piece.view(like.dtype).view(like.shape)


class Shuttle:
    """Copies from host memory to a device, and back. On a GPU they run beside the computation, and no more than two
    sets of tensors are on their way or at work at a time.

    Args:
        device: where to.

    Attributes:
        most: bytes that were there at once, at most.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.most, self._there = device, 0, 0
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self._leaving: deque[Any] = deque()

    def bring(self, held: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copies of tensors, and when they will have arrived."""
        self._there += sum(x.numel() * x.element_size() for x in held.values())
        self.most = max(self.most, self._there)
        if self._streams is None:
            return {key: x.clone() for key, x in held.items()}, None
        while len(self._leaving) > 1:
            self._leaving.popleft().synchronize()
        with torch.cuda.stream(self._streams[0]):
            there = {key: x.to(self.device, non_blocking=True) for key, x in held.items()}
            return there, self._streams[0].record_event()

    def wait(self, there: Mapping[str, Tensor], arrival: Any) -> None:
        """Have the computation wait for an arrival."""
        if arrival is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrival)
            for x in there.values():
                x.record_stream(current)

    def send(self, there: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        """Copy tensors back once the computation has come this far."""
        self._there -= sum(x.numel() * x.element_size() for x in held.values())
        if self._streams is None:
            for key, x in held.items():
                x.copy_(there[key])
            return
        out = self._streams[1]
        out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(out):
            for key, x in held.items():
                x.copy_(there[key], non_blocking=True)
                there[key].record_stream(out)
            self._leaving.append(out.record_event())

    def close(self) -> None:
        """Wait for what is on its way back."""
        while self._leaving:
            self._leaving.popleft().synchronize()


class HostCopies:
    """fp32 copies of weights in host memory. The optimizer's parameters have their shapes, and no memory, but for the
    time of their update."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}
        self._memory: HostMemory | None = None

    def add(self, weight: Tensor) -> nn.Parameter:
        """A parameter on the weight's device that stands for an fp32 copy of it."""
        self._memory = self._memory or HostMemory(weight.device)
        empty = torch.zeros((), device=weight.device).expand(weight.shape)
        parameter = nn.Parameter(empty)
        room = self._memory.room_for(empty)
        self.of[parameter] = room.copy_(weight.detach())
        return parameter

    def leave(self, parameter: nn.Parameter) -> None:
        """The copy is in host memory again."""
        parameter.data = torch.zeros((), device=parameter.device).expand(parameter.shape)


class OneByOne(Optimizer):
    """An optimizer that updates its parameters one after the other, as `step` asks or `update` for one of them.

    Args:
        inner: does the updates; its groups and state are this object's.
        device: of the parameters.
        host: keep the state in host memory.
        copies: parameters of which host memory holds the values.
    """

    def __init__(
        self, inner: Optimizer, device: torch.device, host: bool = False, copies: HostCopies | None = None
    ) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.host, self.device = inner, host, device
        self.copies: Mapping[nn.Parameter, Tensor] = copies.of if copies is not None else {}
        self._leave = copies.leave if copies is not None else lambda parameter: None
        self.shuttle, self._memory = Shuttle(device), HostMemory(device)
        self._held: dict[Any, dict[str, Tensor]] = {}  # by parameter: its state in host memory, of divided ones a part
        self._coming: tuple[Any, dict[str, Tensor], Any] | None = None
        self._after: dict[Any, Any] = {}  # which parameter was updated after which
        self._last: Any = None
        self._shown: Mapping[Any, Tensor] = {}
        self.shared = frozenset(getattr(inner, "shared_entries", ()))
        self.flat_entries = getattr(inner, "flat_entries", ())
        self._link()

    def _link(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}

    def carry_over(self, shown: Mapping[Any, Tensor]) -> None:
        """Copy every update of a parameter into another tensor, too."""
        self._shown = shown

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = closure() if closure is not None else None
        for p in [p for p in self._group_of if p.grad is not None]:
            self.update(p)
        self.finish()
        return loss

    def finish(self) -> None:
        """Every state is where it waits for the next step."""
        if self._coming is not None:
            self.shuttle.send(self._coming[1], self._moving(self._coming[0]))
        self._last = self._coming = None
        self.shuttle.close()

    @torch.no_grad()
    def update(self, parameter: Any) -> None:
        """Update one parameter, by its gradient."""
        there, arrival = self._take(parameter)
        self._after[self._last] = parameter
        self._last = parameter
        following = self._after.get(parameter)
        if following is not None:
            self._coming = (following, *self.shuttle.bring(self._moving(following)))
        self.shuttle.wait(there, arrival)
        self._show(parameter, there)
        self._update(parameter)
        if parameter in self._shown:
            self._shown[parameter].copy_(parameter)
        self._put_back(parameter)

    def _moving(self, parameter: Any) -> dict[str, Tensor]:
        """What of a parameter is in host memory."""
        copy = {"": self.copies[parameter]} if parameter in self.copies else {}
        return {**self._held.get(parameter, {}), **copy}

    def _take(self, parameter: Any) -> tuple[dict[str, Tensor], Any]:
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is parameter:
            return coming[1], coming[2]
        if coming is not None:  # another one than after it the last time
            self.shuttle.send(coming[1], self._moving(coming[0]))
        return self.shuttle.bring(self._moving(parameter))

    def _show(self, parameter: Any, there: Mapping[str, Tensor]) -> None:
        for key, x in there.items():
            if key:
                self.state[parameter][key] = divided_like(parameter, x) if isinstance(parameter, DTensor) else x
            else:
                parameter.data = x

    def _update(self, parameter: Any) -> None:
        """The inner optimizer's step, with this parameter alone in its groups."""
        chosen, kept = self._group_of[parameter], [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [parameter] if group is chosen else []
        try:
            self.inner.step()
        finally:
            for group, parameters in zip(self.param_groups, kept):
                group["params"] = parameters

    def _put_back(self, parameter: Any) -> None:
        state = self.state[parameter] if self.host else {}
        there = {key: _own(x) for key, x in state.items() if self._moves(key, x)}
        held = self._held.setdefault(parameter, {})
        if there and not held:  # the first update has made them
            held.update({key: self._memory.room_for(x) for key, x in there.items()})
            self.shuttle._there += sum(x.numel() * x.element_size() for x in held.values())
        if parameter in self.copies:
            there[""] = parameter.data
        self.shuttle.send(there, self._moving(parameter))
        for key, x in held.items():
            state[key] = x
        if parameter in self.copies:
            self._leave(parameter)

    def _moves(self, key: str, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and key not in self.shared

    def state_dict(self) -> dict[str, Any]:
        """As the inner optimizer's; parts of divided tensors come to the device when they are read."""
        own, parameters = self.inner.state_dict(), [*self._group_of]
        for index, values in own["state"].items():
            parameter = parameters[index]
            if self.host and isinstance(parameter, DTensor):
                own["state"][index] = Gathered(values, self._divided(parameter))
        return own

    def _divided(self, parameter: DTensor) -> Any:
        held = self._held[parameter]
        return lambda key, x: divided_like(parameter, x.to(self.device)) if key in held else x

    def from_whole(self, parameter: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `AdamW8bit`; other optimizers leave values as they are."""
        change = getattr(self.inner, "from_whole", None)
        return values if change is None else change(parameter, values)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Groups and state of an earlier run, whatever kept its state where."""
        if not self.host:
            self.inner.load_state_dict({**state_dict, "state": dict(state_dict["state"])})
            self._link()
            return
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        parameters = [*self._group_of]
        self.state.clear()
        self._held.clear()
        for index, values in state_dict["state"].items():
            parameter = parameters[index]
            if not isinstance(parameter, DTensor):
                values = self.from_whole(parameter, values)
            self._hold(parameter, values)

    def _hold(self, parameter: Any, values: Mapping[str, Any]) -> None:
        state, held = self.state[parameter], self._held.setdefault(parameter, {})
        for key, value in values.items():
            if self._moves(key, value):
                own = _own(value)
                held[key] = self._memory.room_for(own).copy_(own)
            state[key] = held.get(key, value)
        add_maps = getattr(self.inner, "_add_maps", None)
        if add_maps is not None:
            add_maps(parameter)


def _own(x: Any) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def kind_of(optimizer: Optimizer) -> str:
    """Name of the class that does an optimizer's updates."""
    return type(optimizer.inner if isinstance(optimizer, OneByOne) else optimizer).__name__
