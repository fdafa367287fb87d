"""LoRA adapters at inference: which there are, whether they fit the model, and how they change it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.diffusion.lora_files import read_lora
from opensora.diffusion.lora_fit import Adapter, Fit, LowRank
from opensora.models.mmdit.loading import covers
from opensora.utils.errors import UserError, shorten
from opensora.utils.logging import get_logger
from opensora.utils.weights import check_finite
from opensora.utils.weights_loading import Change

logger = get_logger(__name__)

KEY = "pretrained_lora_path"


def split_lora(entry: str) -> tuple[str, float]:
    """Path and strength of an adapter: ``PATH`` (strength 1) or ``PATH@0.7``.

    Raises:
        UserError: the strength is not a finite number.
    """
    path, at, text = entry.rpartition("@")
    if not at or Path(entry).expanduser().exists():
        return entry, 1.0
    try:
        strength = float(text)
    except ValueError:
        raise UserError(f"{KEY} {entry!r}: {text!r} after @ is not a number") from None
    if not math.isfinite(strength):
        raise UserError(f"{KEY} {entry!r}: the strength after @ must be a finite number")
    return path, strength


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """``pretrained_lora_path`` as a list of entries."""
    if not value:
        return []
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)


def read_loras(value: str | Sequence[str] | None, model: nn.Module, partial: bool = False) -> list[Adapter]:
    """Read adapters and see that they fit a model.

    Args:
        value: ``pretrained_lora_path``.
        model: what they are for; on the meta device will do.
        partial: use what fits of an adapter that fits in part.

    Raises:
        UserError: no adapter there, a damaged one, one of another model, or one that fits in part.
    """
    adapters = []
    for entry in as_list(value):
        path, strength = split_lora(entry)
        try:
            adapters.append(Fit(model, read_lora(path), Adapter(path, strength)).adapter())
        except UserError as error:
            raise UserError(f"{KEY} {error}") from error
        _judge(adapters[-1], partial)
    for name in {name for adapter in adapters for name in adapter.changes}:
        changes = [adapter.changes[name] for adapter in adapters if name in adapter.changes]
        whole = any(f"{name}.weight" in adapter.whole for adapter in adapters)
        if (len(changes) > 1 or whole) and any(change.magnitude is not None for change in changes):
            raise UserError(f"{KEY}: a DoRA adapter cannot be combined with another that changes {name} too: use one")
    return adapters


def _judge(adapter: Adapter, partial: bool) -> None:
    """Refuse an adapter that does not fit, or not wholly; warn of one without effect."""
    said = "".join(f"\n  {reason}: {shorten(names)}" for reason, names in adapter.misfits.items())
    who = f"{KEY} {adapter.path}: the adapter"
    if not len(adapter):
        raise UserError(f"{who} fits no module of the model, it was trained for another one{said}")
    if not any(change.up.count_nonzero() for change in adapter.changes.values()) and not adapter.whole:
        logger.warning("%s has no effect: its changes are zero, or its strength is", who)
    if not said:
        return
    text = f"{who} fits the model only in part ({len(adapter)} modules){said}"
    if not partial:
        raise UserError(f"{text}\n  It is damaged or of another model; --lora-partial True uses what fits.")
    logger.warning("%s", text)


class LoraLinear(nn.Module):
    """A linear layer with adapters beside it.

    Args:
        base_layer: the layer; its weights stay as they are.
        change: what is added to it.
    """

    def __init__(self, base_layer: nn.Linear, change: LowRank) -> None:
        super().__init__()
        self.base_layer = base_layer
        device = base_layer.weight.device
        self.register_buffer("down", change.down.to(device), persistent=False)
        self.register_buffer("up", change.up.to(device), persistent=False)
        lengths = None if change.magnitude is None else change.lengths(base_layer.weight)
        self.register_buffer("lengths", lengths, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``, added in fp32."""
        down, up, lengths = self.get_buffer("down"), self.get_buffer("up"), self._buffers["lengths"]
        change = F.linear(F.linear(x.to(down.dtype), down), up)
        if lengths is None:
            return (self.base_layer(x) + change).to(x.dtype)
        if lengths.shape[0] == 1:  # of columns, [1, in]
            scaled = x.to(down.dtype) * lengths[0]
            result = F.linear(scaled.to(x.dtype), self.base_layer.weight) + F.linear(F.linear(scaled, down), up)
        else:
            result = (F.linear(x, self.base_layer.weight) + change) * lengths[:, 0]
        return (result if self.base_layer.bias is None else result + self.base_layer.bias).to(x.dtype)


@torch.no_grad()
def apply_loras(model: nn.Module, adapters: Sequence[Adapter], merge: bool = True) -> nn.Module:
    """Add adapters to a model.

    Args:
        model: changed in place.
        adapters: see :func:`read_loras`.
        merge: add them to the weights, so that a forward costs what it cost before. Otherwise they stay beside the
            weights: slower, but small changes are not lost where the weights are bf16. Biases, and parameters that an
            adapter holds whole, are changed in any case.

    Raises:
        UserError: changed weights that are not finite.
    """
    for adapter in adapters:
        for name in adapter.whole:
            _change(name, model.get_parameter(name), adapter)
    tell_loras(adapters)
    if not merge:
        attach_loras(model, adapters)
        return model
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.changes):
        module: Any = model.get_submodule(name)
        _merge(name, module.weight, [adapter.changes[name] for adapter in adapters if name in adapter.changes])
    return model


def with_loras(adapters: Sequence[Adapter], merge: bool = True) -> Change:
    """What a model's parameters become with adapters, one by one: as :func:`apply_loras` does it, while they are read.

    Without ``merge`` only those that it changes in any case.
    """

    @torch.no_grad()
    def change(key: str, value: Tensor) -> Tensor:
        module, _, leaf = key.rpartition(".")
        for adapter in adapters:
            if key in adapter.whole:
                value = value.clone()
                _change(key, value, adapter)
        changes = [each.changes[module] for each in adapters if module in each.changes] if leaf == "weight" else []
        if merge and changes:
            value = value.clone()
            _merge(module, value, changes)
        return value

    return change


def check_quantized(adapters: Sequence[Adapter], merge: bool, path: str | None) -> None:
    """See that adapters can be used with weights that a file holds quantised.

    Raises:
        UserError: they would change weights that are quantised.
    """
    for adapter in adapters:
        whole = {name.removesuffix(".weight") for name in adapter.whole if name.endswith("weight")}
        changed = sorted(name for name in {*whole, *(adapter.changes if merge else ())} if covers(name))
        if changed:
            advice = "give the weights that it was made from" + ("" if whole else ", or --merge-lora False")
            raise UserError(
                f"{KEY} {adapter.path}: it changes {shorten(changed)}, whose weights are quantised in {path}: {advice}"
            )


def attach_loras(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Put adapters beside the weights of a model, which stay as they are."""
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.changes):
        changes = [adapter.changes[name] for adapter in adapters if name in adapter.changes]
        module: Any = model.get_submodule(name)
        down, up = torch.cat([each.down for each in changes]), torch.cat([each.up for each in changes], dim=1)
        model.set_submodule(name, LoraLinear(module, LowRank(down, up, changes[0].magnitude)))


def tell_loras(adapters: Sequence[Adapter]) -> None:
    """Say in the log what adapters change."""
    for adapter in adapters:
        logger.info(
            "%s: %d of the model's modules changed, strength %g (%s)",
            *(adapter.path, len(adapter), adapter.strength, shorten([*(adapter.changes or adapter.whole)])),
        )


def _change(name: str, parameter: Tensor, adapter: Adapter) -> None:
    """Change a whole parameter, in place, by what an adapter holds for it."""
    if name in adapter.replaced:
        parameter.lerp_(adapter.replaced[name].to(parameter), adapter.strength)
    if name in adapter.added:
        parameter.copy_(parameter.float() + adapter.added[name].to(parameter.device))
    if name in adapter.products:
        total = parameter.float()
        total = total.clone() if total is parameter else total
        for placed in adapter.products[name]:
            placed.add_to(total)
        parameter.copy_(total)
    check_finite(name, parameter, f"the model with the adapter {adapter.path}")


def _merge(name: str, weight: Tensor, changes: Sequence[LowRank]) -> None:
    total = weight.float()
    for change in changes:
        lengths = None if change.magnitude is None else change.lengths(weight)
        total = torch.addmm(total, change.up.to(weight.device), change.down.to(weight.device))
        if lengths is not None:
            total *= lengths
    check_finite(name, total, f"the model with {KEY} (is the strength after @ sensible?)")
    weight.copy_(total)
