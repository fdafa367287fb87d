"""Weights written whole, or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as one safetensors file, beside its place first and then renamed: never half a file.

    Args:
        state_dict: tensors on any device; shared storages are written once per name.
        path: the file; its folder is made.
        metadata: text to record, such as the layouts that `load_model` checks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state_dict.items():
        value = value.detach().contiguous()
        if value.untyped_storage().data_ptr() in seen:  # the format has no shared tensors
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    try:
        beside.touch()
        mode = beside.stat().st_mode  # what the user's umask gives; the library would make the file private
        save_file(tensors, beside, metadata={"format": "pt", **(metadata or {})})
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
