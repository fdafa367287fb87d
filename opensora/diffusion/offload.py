"""Models on the device only while they work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from opensora.acceleration.placing import is_on, placed


@contextmanager
def on_device(model: nn.Module, device: torch.device, offload: bool | str) -> Iterator[nn.Module]:
    """Have a model on ``device`` inside the block.

    With ``offload`` its weights are copied there and the copies dropped at the end; the originals stay where they are
    all the time, so leaving costs nothing. Without, or where the model lives on ``device`` anyway, nothing happens.
    """
    if not offload or is_on(model, device):
        yield model
        return
    try:
        with placed(model, device):
            yield model
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
