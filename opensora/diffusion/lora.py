"""LoRA adapters at inference (PEFT format)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from opensora.utils.errors import UserError


def split_lora(entry: str) -> tuple[str, float]:
    """Folder and strength of an adapter: ``PATH`` (strength 1) or ``PATH@0.7``.

    Raises:
        UserError: the strength is not a number.
    """
    path, at, strength = entry.rpartition("@")
    if not at or Path(entry).exists():
        return entry, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise UserError(f"pretrained_lora_path {entry!r}: {strength!r} after @ is not a number") from None


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """``pretrained_lora_path`` as a list of entries."""
    if not value:
        return []
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)


def check_loras(value: str | Sequence[str] | None) -> None:
    """See that every adapter is there.

    Raises:
        UserError: a folder without ``adapter_config.json``, or PEFT is not installed.
    """
    for entry in as_list(value):
        folder = Path(split_lora(entry)[0])
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"pretrained_lora_path {folder}: no adapter there (adapter_config.json is missing)")
    if as_list(value):
        try:
            import peft  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise UserError("pretrained_lora_path needs PEFT: pip install peft") from error


def apply_loras(model: nn.Module, value: str | Sequence[str] | None, merge: bool = True) -> nn.Module:
    """Add adapters to a model, each with its strength.

    Args:
        model: gets the adapters; its own weights change when they are merged.
        value: ``pretrained_lora_path``.
        merge: add them to the weights, so that a forward costs what it cost before. Otherwise they stay beside the
            weights: slower, but small changes are not lost where the weights are bf16.

    Returns:
        The model, of its own class.
    """
    entries = as_list(value)
    if not entries:
        return model
    from peft import PeftModel

    wrapped: Any = None
    names = [f"adapter_{number}" for number in range(len(entries))]
    for name, entry in zip(names, entries):
        path, strength = split_lora(entry)
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            wrapped.load_adapter(path, adapter_name=name)
        for module in wrapped.modules():
            if hasattr(module, "set_scale") and name in getattr(module, "scaling", {}):
                module.set_scale(name, strength)
    if merge:
        return wrapped.merge_and_unload(adapter_names=names)
    wrapped.base_model.set_adapter(names)
    return wrapped.base_model.model.requires_grad_(False)
