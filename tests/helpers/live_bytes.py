"""Bytes of the tensors that are alive."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, inside its block, the memory of tensors that operations make there and that still exist. What is mapped
    from a file does not count, nor do tensors on meta.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, Any] = {}

    @property
    def now(self) -> int:
        """Bytes at this moment."""
        held = [(key, ref()) for key, ref in self._seen.items()]
        self._seen = {key: self._seen[key] for key, storage in held if storage is not None}
        return sum(storage.nbytes() for _, storage in held if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # which makes plain tensors of it, and comes here again
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given and storage.filename is None:
                self._seen[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now)
        return out


def _storages(values: Any) -> list[Any]:
    """Memory of the plain tensors in any structure."""
    found = [x for x in tree_leaves(values) if isinstance(x, Tensor) and not isinstance(x, DTensor)]
    return [x.untyped_storage() for x in found if x.device.type != "meta"]


def bytes_of(*tensors: Tensor) -> int:
    """Of the elements of tensors; of divided ones, of what this rank holds."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def of_model(model: torch.nn.Module) -> int:
    """Of all parameters."""
    return bytes_of(*model.parameters())
