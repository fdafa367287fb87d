"""Registered modules by name, and the one function that builds them from a config section."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opensora.config.keys import Option, as_group, check_required, check_value, group_options
from opensora.config.options import Component
from opensora.config.registries import DATASETS, MODELS, LazyRegistry
from opensora.utils.errors import UserError
from opensora.utils.nearest import nearest_key

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DATASETS", "MODELS", "LazyRegistry", "build_module"]


def build_module(
    cfg: "Component | Mapping[str, Any] | nn.Module | None", registry: LazyRegistry, **overrides: Any
) -> Any:
    """Build what a config section describes.

    Args:
        cfg: a section (never changed): an option group, or a dict with ``type`` and its keys; an already built module
            (returned as it is), or None (None is returned).
        registry: ``MODELS`` or ``DATASETS``.
        overrides: keys that replace or complete those of the section, and arguments of the factory that no config
            holds (``device_map``, ``torch_dtype``). A module's class that is registered itself need not take them, nor
            load weights: that is done here.

    Raises:
        UserError: no ``type``, an unknown one, a key that the type does not take, or one of another kind than its
            option group says.
        TypeError: ``cfg`` is none of these.
    """
    if cfg is None or hasattr(cfg, "state_dict"):
        return cfg
    if not isinstance(cfg, Component | Mapping):
        raise TypeError(f"cannot build a {registry.name} from a {type(cfg).__name__}: expected a dict with `type`")
    content = cfg.to_dict() if isinstance(cfg, Component) else {key: copy.deepcopy(value) for key, value in cfg.items()}
    arguments = {**content, **overrides}
    name = arguments.pop("type", None)
    if name is None:
        raise UserError(f"a {registry.name} section has no `type`; known: {', '.join(registry.names)}")
    factory = registry.resolve(name)
    if isinstance(factory, type) and hasattr(factory, "state_dict"):
        return _load_class(name, factory, registry.config_of(name), arguments)
    return _call(name, factory, registry.config_of(name), arguments)


def _load_class(name: str, model: type, group: type[Component] | None, arguments: dict[str, Any]) -> Any:
    """Make a model whose class is registered itself; what the class does not take is done here."""
    from opensora.utils.weights_loading import load_model  # needs torch

    taken = {*group_options(group), *inspect.signature(model).parameters}
    given = {key: arguments.get(key) for key in ("from_pretrained", "device_map", "torch_dtype", "cache_dir")}
    arguments = {key: value for key, value in arguments.items() if key in taken or key not in given}
    if "device_map" in taken:
        return _call(name, model, group, arguments)
    source, device, dtype, cache = given.values()
    return load_model(lambda: _call(name, model, group, arguments), source, device or "cpu", dtype, cache_dir=cache)


def _call(name: str, factory: Callable[..., Any], group: type[Component] | None, arguments: Mapping[str, Any]) -> Any:
    if group is not None and next(iter(inspect.signature(factory).parameters), "") == "config":
        return _build_typed(name, factory, group, arguments)
    return factory(**_checked_arguments(name, factory, group, arguments))


def _build_typed(name: str, factory: Callable[..., Any], group: type[Component], arguments: Mapping[str, Any]) -> Any:
    """Call a factory with its option group and the arguments that are not of the group."""
    runtime = [*inspect.signature(factory).parameters][1:]
    options = group_options(group)
    checked = _checked(name, options, runtime, arguments)
    check_required(group, checked, f"'{name}'")
    config = as_group(group, {"type": name, **{key: value for key, value in checked.items() if key in options}})
    return factory(config, **{key: value for key, value in checked.items() if key not in options})


def _checked_arguments(
    name: str, factory: Callable[..., Any], group: type | None, arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Keyword arguments of a factory; refuses those that it does not take, naming the nearest."""
    parameters = inspect.signature(factory).parameters
    if group is None and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # only the factory can tell
        return arguments
    return _checked(name, group_options(group), [*parameters], arguments)


def _checked(
    name: str, options: Mapping[str, Option], others: Sequence[str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments in the types of their options; refuses those that are neither options nor among ``others``."""
    for key in arguments:
        if key not in options and key not in others:
            groups = {key: option.metadata["group"] for key, option in options.items() if "group" in option.metadata}
            below = [f"{section}.{field}" for section, group in groups.items() for field in group_options(group)]
            near = nearest_key(key, [*options, *others, *below])
            hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(sorted({*options, *others}))}"
            raise UserError(f"'{name}' takes no argument '{key}'; {hint}")
    return {
        key: check_value(value, options[key], key, f"'{name}'") if key in options else value
        for key, value in arguments.items()
    }
