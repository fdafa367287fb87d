"""Loaded models on another device, or in another precision."""

import torch
from torch import nn


def move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model; afterwards its tensors have the dtypes that they would have if it had been loaded in ``dtype``."""
    wide = _kept_wide(model) if dtype == torch.float16 else {}
    model.to(device, dtype)
    for name, value in wide.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(value.to(device), requires_grad=False)


def _kept_wide(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name that transformers keeps in float32 where a model works in half precision, which they overflow."""
    parts = {
        part for module in model.modules() for part in getattr(module, "_keep_in_fp32_modules", None) or () if part
    }
    return {name: value.detach().float() for name, value in model.named_parameters() if parts & {*name.split(".")[:-1]}}
