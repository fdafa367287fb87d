"""Models on the device only while they work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def on_device(model: nn.Module, device: torch.device, offload: bool) -> Iterator[nn.Module]:
    """Have a model on ``device`` inside the block.

    With ``offload`` its weights are copied there and the copies dropped at the end; the originals stay where they are
    all the time, so leaving costs nothing. Without, or where the model lives on ``device`` anyway, nothing happens.
    """
    slots: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (owner, name, tensor)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]
    if not offload or all(tensor.device == device for _, _, tensor in slots):
        yield model
        return
    copies: dict[int, torch.Tensor] = {}  # by original: a weight that two modules share is copied once
    try:
        for owner, name, tensor in slots:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor, device)
            owner[name] = copies[id(tensor)]
        copies.clear()
        yield model
    finally:
        for owner, name, tensor in slots:
            owner[name] = tensor
        copies.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
