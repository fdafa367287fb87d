"""Weights written whole, or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from opensora.utils.files import write_beside


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as one safetensors file, beside its place first and then renamed: never half a file.

    Args:
        state_dict: tensors on any device; shared storages are written once per name.
        path: the file; its folder is made.
        metadata: text to record, such as the layouts that `load_model` checks.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state_dict.items():
        value = value.detach().contiguous()
        if value.untyped_storage().data_ptr() in seen:  # the format has no shared tensors
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    write_beside(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})}))
