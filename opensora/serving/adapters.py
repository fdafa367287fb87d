"""A LoRA adapter on a warm model for the time of a job."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from opensora.diffusion.lora import LoraLinear, apply_loras, read_loras


@contextmanager
def with_lora(model: nn.Module, entry: str | None, partial: bool = False) -> Iterator[None]:
    """Within it, a model has an adapter beside its weights; afterwards it is as it was, to the bit.

    Args:
        model: whole, on one device.
        entry: ``PATH@strength``, or None for none.
        partial: use what fits of an adapter that fits in part.

    Raises:
        UserError: see :func:`opensora.diffusion.lora.read_loras`.
    """
    if entry is None:
        yield
        return
    adapters = read_loras([entry], model, partial)
    names = {name for adapter in adapters for name in (*adapter.replaced, *adapter.added)}
    kept = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        apply_loras(model, adapters, merge=False)
        yield
    finally:
        for name, value in kept.items():
            model.get_parameter(name).data.copy_(value)
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLinear) and any(name in adapter.changes for adapter in adapters):
                model.set_submodule(name, module.base_layer)
