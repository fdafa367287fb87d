"""What of a model is trained: all of it, some of it, or LoRA adapters; and under which names it is saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.diffusion.lora import read_loras
from opensora.diffusion.lora_files import find_lora
from opensora.diffusion.lora_fit import LowRank
from opensora.training.weights.groups import matches
from opensora.training.weights.masters import MasterWeights
from opensora.utils.errors import UserError, shorten
from opensora.utils.optional import PEFT_HINT, require
from opensora.utils.weights import load_state_dict, open_weights


def freeze(model: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Take parameters out of training.

    Args:
        model: changed in place.
        patterns: names of modules or parameters (``txt_in``, ``double_blocks.0``), or patterns with ``*``
            (``double_blocks.*.txt_mlp.*``); a list, or one text with commas.

    Returns:
        The names of the frozen parameters.

    Raises:
        UserError: a pattern that fits nothing, or nothing is left to train.
    """
    wanted = [p.strip() for p in patterns.split(",")] if isinstance(patterns, str) else list(patterns or [])
    frozen = set()
    for pattern in wanted:
        found = {name for name, _ in model.named_parameters() if matches(name, pattern)}
        if not found:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"freeze_layers: {pattern!r} fits no parameter; the model's parts are {parts}")
        frozen |= found
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"freeze_layers={wanted}: nothing is left to train")
    return sorted(frozen)


def copy_from_mmap(model: nn.Module) -> None:
    """Copy weights that lie in host memory to where any new tensor could lie; read from a file, they lie as they lay
    there. Kernels of a CPU round the last bit differently by where in memory a tensor begins, and a run that goes on
    from a file must round as one that never stopped."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def require_peft() -> Any:
    """The package PEFT; a UserError says how to get it."""
    return require("peft", "lora_config", PEFT_HINT)


class LoraAdapter:
    """Low-rank adapters in a model (arXiv:2106.09685), by PEFT. The model keeps its class; its own weights are frozen.

    Args:
        model: changed in place.
        lora_config: arguments of ``peft.LoraConfig``.
        start: adapter to start from, of this program or any that sampling takes (`opensora.diffusion.lora`).

    Raises:
        UserError: PEFT is not installed, arguments it does not know, target modules the model does not have, or
            weights to start from that do not fit.
    """

    def __init__(self, model: nn.Module, lora_config: Mapping[str, Any], start: str | Path | None = None) -> None:
        peft = require_peft()
        foreign = start is not None and not is_own(start)
        changes = read_changes(start, model) if foreign and start is not None else {}
        try:
            config = peft.LoraConfig(**{"init_lora_weights": True, **lora_config})
            if not {"target_modules", "target_parameters"} & lora_config.keys():
                raise UserError("lora_config: give target_modules, e.g. ['qkv', 'proj'] or 'all-linear'")
            self._peft: Any = peft.get_peft_model(model, config)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"lora_config={dict(lora_config)}: {error}") from error
        if foreign:
            self.load(self._as_own(model, changes))
        elif start is not None:
            self.load(read_adapter(start))

    def _as_own(self, model: nn.Module, changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
        """Changes under PEFT's names, for the alpha and rank of this adapter."""
        state = {}
        for name, change in changes.items():
            layer: Any = model.get_submodule(name)
            state[f"base_model.model.{name}.lora_A.weight"] = change.down
            scale = layer.scaling["default"] if hasattr(layer, "scaling") else 1.0
            state[f"base_model.model.{name}.lora_B.weight"] = change.up / scale
            if change.magnitude is not None:
                state[f"base_model.model.{name}.lora_magnitude_vector"] = change.magnitude.flatten()
        return state

    def state_dict(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's weights under PEFT's names; ``values`` (by the model's names) are named so instead."""
        from peft import get_peft_model_state_dict

        named = None if values is None else {f"base_model.model.{name}": value for name, value in values.items()}
        return get_peft_model_state_dict(self._peft, state_dict=named)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved weights.

        Raises:
            UserError: weights of another adapter; of a model on the meta device that is all that is looked at.
        """
        from peft import set_peft_model_state_dict

        own = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        if own != given:
            odd = sorted({k for k in own.keys() | given.keys() if own.get(k) != given.get(k)})
            raise UserError(
                f"the saved adapter does not fit lora_config (r, target_modules) or the model; {len(odd)} tensors "
                f"differ, the first is {odd[0]}"
            )
        if not any(parameter.is_meta for parameter in self._peft.parameters()):
            set_peft_model_state_dict(self._peft, dict(state))

    def write_config(self, folder: Path) -> None:
        """``adapter_config.json`` as PEFT writes it."""
        self._peft.peft_config["default"].save_pretrained(str(folder))


def is_own(path: str | Path) -> bool:
    """Whether an adapter is a folder whose tensors have the names that PEFT gives them."""
    names = open_weights(find_lora(path)).shapes
    return Path(path).is_dir() and all(name.startswith("base_model.model.") for name in names)


def read_changes(path: str | Path, model: nn.Module) -> dict[str, LowRank]:
    """What an adapter of any trainer changes in a model's linear layers.

    Raises:
        UserError: it does not fit, or changes more than these.
    """
    (adapter,) = read_loras([str(path)], model)
    more = [*adapter.whole, *(n for n, c in adapter.changes.items() if c.magnitude is not None and not c.of_rows)]
    if more:
        raise UserError(f"{path}: it changes {shorten(more)}, which cannot be trained further beside an adapter")
    return adapter.changes


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """Weights of an adapter folder.

    Raises:
        UserError: none there.
    """
    return load_state_dict(find_lora(folder))


class TrainedWeights:
    """The weights that training changes, as they are averaged and saved.

    Args:
        model: the plain model.
        masters: its fp32 copies, if it computes in another dtype.
        adapter: its adapters, if only those are trained.
    """

    def __init__(
        self, model: nn.Module, masters: MasterWeights | None = None, adapter: LoraAdapter | None = None
    ) -> None:
        self.model, self.masters, self.adapter = model, masters, adapter

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the model's weights in its own dtype, or the adapter's in fp32."""
        return self.state_dict() if self.adapter is not None else self.model.state_dict()

    def state_dict(self) -> dict[str, Tensor]:
        """The same, in fp32 where there are such copies: what an average is taken of."""
        copies = self.masters.state_dict() if self.masters is not None else {}
        if self.adapter is None:
            return {**self.model.state_dict(), **copies}
        return {**self.adapter.state_dict(), **(self.adapter.state_dict(copies) if copies else {})}

    def _shown(self) -> dict[str, Tensor]:
        """The model's own tensors, by the names of `saved`."""
        return self.adapter.state_dict() if self.adapter is not None else self.model.state_dict()

    @torch.no_grad()
    def show(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put other values into the model for a while; returns those that were there, to be put back."""
        own, before = self._shown(), {}
        for key, value in state.items():
            before[key] = own[key].detach().clone()
            own[key].copy_(value)
        return before
