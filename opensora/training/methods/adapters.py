"""Several LoRA adapters in one frozen model: student and fake score in the memory of one, switched between forwards."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from opensora.training.weights.adapters import require_peft

STUDENT = "default"  # the adapter that PEFT makes first


def adapted_layers(model: nn.Module) -> list[Any]:
    """Layers of a model that hold adapters."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def adapter_shown(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within it, a model works with the adapter of that name, or with none; which of them train stays as it is."""
    layers = adapted_layers(model)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        layer._active_adapter = [name] if name is not None else layer._active_adapter
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before):
            layer._disable_adapters, layer._active_adapter = disabled, active


class FurtherAdapter(nn.Module):
    """A second adapter in a model that has one, as a module of its own: its parameters are the adapter's alone.

    Args:
        model: a diffusion model with the adapter ``default``; changed in place.
        lora_config: arguments of ``peft.LoraConfig``, of both adapters.
        name: of the second one.
    """

    def __init__(self, model: nn.Module, lora_config: Mapping[str, Any], name: str) -> None:
        super().__init__()
        peft = require_peft()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        was_training = model.training
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that is the point
            config = peft.LoraConfig(**{"init_lora_weights": True, **lora_config})
            peft.inject_adapter_in_model(config, model, adapter_name=name)
        for layer in adapted_layers(model):
            layer._active_adapter = [STUDENT]
        model.train(was_training)
        self.name, self._model = name, (model,)  # in a tuple: the model is no part of this module
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.requires_grad_(True)
                self.register_parameter(path.replace(".", "/"), parameter)
        for parameter in trained:
            parameter.requires_grad_(True)

    def forward(self, **inputs: Any) -> Tensor:
        """The model's output with this adapter."""
        (model,) = self._model
        with adapter_shown(model, self.name):
            return model(**inputs)
