"""Memory that encoding and decoding take, counted without doing them.

The network runs on the meta device, where tensors have sizes and no content, and the bytes of those that are alive are
added up. To them comes what cuDNN holds during a convolution of a video: its input and its output in another order.
Together they are what an H100 was measured to take, within 3 %: 15.3, 7.8 and 1.3 GiB for tiles of 192 x 256 pixels
with 129 and 65 frames, and of 128 x 128 with 33 (measured: 15.3, 7.8, 1.4).
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTION = torch.ops.aten.convolution.default
GROUP_NORM = torch.ops.aten.native_group_norm.default


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and alive.

    Args:
        workspace: count the copies that cuDNN makes for a convolution, too.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at a time.
        written: bytes of all that were made.
        flops: operations of convolutions.
    """

    def __init__(self, workspace: bool = False) -> None:
        super().__init__()
        self.workspace = workspace
        self.now = self.peak = self.written = 0
        self.flops = 0.0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        quick = func is GROUP_NORM and args[0].is_meta and args[0].is_contiguous()
        out = _group_norm(*args) if quick else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor)
        held = 0
        if func is CONVOLUTION:
            self.flops += 2.0 * out.numel() * args[1][0].numel()
            held = (args[0].nbytes + out.nbytes) * self.workspace
        self.peak = max(self.peak, self.now + held)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.now += size
            self.written += size

    def _free(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size


def _group_norm(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, area: int, groups: int, eps: float
) -> Any:
    """What torch gives on meta of a contiguous ``x``; it works that out in steps that take two fifths of a count."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta"), *(x.new_empty(batch, groups) for _ in range(2))


@contextmanager
def weightless(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have meta tensors in place of a model's weights, floating ones in ``dtype``, inside the block."""
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (owner, name, tensor)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]
    try:
        for owner, name, tensor in slots:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind, device="meta")
            owner[name] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        yield
    finally:
        for owner, name, tensor in slots:
            owner[name] = tensor


@dataclass(frozen=True)
class Cost:
    """What a run of a network takes.

    Attributes:
        peak: bytes at most at a time beyond the weights, cuDNN's copies included.
        written: bytes of all that its layers give.
        flops: operations of its convolutions.
    """

    peak: float
    written: float
    flops: float


def cost_of(model: nn.Module, dtype: torch.dtype, run: Callable[[], Any]) -> Cost | None:
    """What a run of a model takes.

    Args:
        model: on any device; its weights are left alone.
        dtype: in which it works.
        run: calls it with meta tensors.

    Returns:
        None where the model does something that only works with values.
    """
    with torch.no_grad(), weightless(model, dtype), _uncompiled(), LiveBytes(workspace=True) as live:
        try:
            run()
        except RuntimeError:  # also NotImplementedError
            return None
    return Cost(live.peak, live.written, live.flops)


def _uncompiled() -> AbstractContextManager[Any]:
    """Nothing is compiled for meta tensors."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()
