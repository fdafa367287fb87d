"""LoRA adapters on a model that is loaded already: put on, and taken off without a trace."""

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.diffusion.lora import KEY, LoraLinear, apply_loras, read_loras
from opensora.utils.errors import UserError, shorten


class LoadedLora(NamedTuple):
    """An adapter on a model."""

    path: str
    strength: float

    @property
    def entry(self) -> str:
        """As ``pretrained_lora_path`` has it."""
        return f"{self.path}@{self.strength!r}"


class LoraStack:
    """Adapters on a model, in the order in which they came; the model is as it would be if it were loaded with these.

    Args:
        model: whole.
        plain: the same model, maybe on meta, if ``model`` has quantised weights; adapters stay beside these.
        merge: add adapters to the weights, of which a copy is kept in host memory; otherwise they work beside them.
        partial: use what fits of an adapter that fits in part.

    Raises:
        UserError: the model has adapters beside its weights already.
    """

    def __init__(
        self, model: nn.Module, plain: nn.Module | None = None, merge: bool = True, partial: bool = False
    ) -> None:
        if any(isinstance(module, LoraLinear) for module in model.modules()):
            raise UserError(
                f"load_lora: adapters of {KEY} lie beside the weights (merge_lora False); load all of them with "
                "load_lora, or all with the config"
            )
        self.model, self.plain, self.partial = model, plain or model, partial
        self.merge = merge and plain is None
        self.loaded: tuple[LoadedLora, ...] = ()
        self._kept: dict[str, Tensor] = {}  # weights as they were, by name
        self._beside: tuple[str, ...] = ()  # modules that adapters work beside

    def add(self, path: str | Path, strength: float = 1.0) -> None:
        """Put one more adapter on.

        Raises:
            UserError: see :func:`opensora.diffusion.lora.read_loras`; the model stays as it was.
        """
        if not isinstance(strength, numbers.Real) or isinstance(strength, bool):
            raise UserError(f"load_lora: strength {strength!r} is not a number")
        self._become((*self.loaded, LoadedLora(str(path), float(strength))))

    def remove(self, path: str | Path | None = None) -> None:
        """Take an adapter off, or all of them.

        Raises:
            UserError: there is none of that path.
        """
        left = tuple(each for each in self.loaded if path is not None and each.path != str(path))
        if path is not None and left == self.loaded:
            named = ", ".join(each.path for each in self.loaded) or "none"
            raise UserError(f"unload_lora: {path} is not loaded; loaded: {named}")
        self._become(left)

    def _become(self, wanted: tuple[LoadedLora, ...]) -> None:
        before = self.loaded
        self._restore()
        try:
            self._put(wanted)
        except Exception:
            self._restore()
            self._put(before)
            raise

    def _put(self, wanted: Sequence[LoadedLora]) -> None:
        """Put adapters on the plain model."""
        adapters = read_loras([each.entry for each in wanted], self.plain, self.partial)
        changed = {name for adapter in adapters for name in adapter.changes}
        whole = {name for adapter in adapters for name in adapter.whole}
        quantised = whole - {name for name, _ in self.model.named_parameters()}
        if quantised:
            raise UserError(f"load_lora: {shorten(sorted(quantised))} are replaced whole, but are quantised")
        names = sorted(whole | {f"{name}.weight" for name in changed if self.merge})
        self._kept = {name: self.model.get_parameter(name).detach().to("cpu", copy=True) for name in names}
        self._beside = () if self.merge else tuple(sorted(changed))
        apply_loras(self.model, adapters, self.merge)
        self.loaded = tuple(wanted)

    @torch.no_grad()
    def _restore(self) -> None:
        """The model without adapters, to the bit."""
        for name in self._beside:
            module = self.model.get_submodule(name)
            if isinstance(module, LoraLinear):
                self.model.set_submodule(name, module.base_layer)
        for name, value in self._kept.items():
            self.model.get_parameter(name).copy_(value)
        self._kept, self._beside, self.loaded = {}, (), ()
