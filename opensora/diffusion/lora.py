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


def merge_loras(model: nn.Module, value: str | Sequence[str] | None) -> nn.Module:
    """Add adapters to the weights of a model, each with its strength; afterwards it costs what it cost before."""
    for entry in as_list(value):
        from peft import PeftModel

        path, strength = split_lora(entry)
        wrapped: Any = PeftModel.from_pretrained(model, path)
        for module in wrapped.modules():
            if hasattr(module, "set_scale"):
                for adapter in list(getattr(module, "scaling", {})):
                    module.set_scale(adapter, strength)
        model = wrapped.merge_and_unload()
    return model
