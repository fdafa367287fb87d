"""Registered modules by name, and the one function that builds them from a config section."""

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any

from mmengine.registry import Registry
from torch import nn

from opensora.config.options import COMPONENTS
from opensora.config.values import coerce, describe
from opensora.utils.errors import UserError
from opensora.utils.nearest import nearest_key

# Arguments that a program, not a config file, gives to a factory.
RUNTIME_KEYS = ("device_map", "torch_dtype")


class LazyRegistry(Registry):
    """A registry that knows in which module each shipped name lives and imports only that one.

    Asking for ``flux`` must not import the autoencoders, the datasets or anything else; names registered by a
    user's own module (``@MODELS.register_module()``) work as in any mmengine registry.
    """

    def __init__(self, name: str, modules: Mapping[str, str]) -> None:
        super().__init__(name)
        self.modules = MappingProxyType(dict(modules))

    @property
    def names(self) -> list[str]:
        """Every name that can be built, imported or not, in alphabetical order."""
        return sorted({*self.modules, *self.module_dict})

    def resolve(self, name: str) -> Callable[..., Any]:
        """Factory registered as ``name``; imports its module first if need be.

        Raises:
            UserError: nothing of that name; names the nearest one.
        """
        if name not in self.module_dict and name in self.modules:
            self._import(self.modules[name])
            if name not in self.module_dict:
                raise UserError(f"{self.name} '{name}' is not part of this version of opensora")
        factory = self.module_dict.get(name)
        if factory is None:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(self.names)}"
            raise UserError(f"type '{name}' is not a registered {self.name}; {hint}")
        return factory

    @staticmethod
    def _import(module: str) -> None:
        """Import a module of the package; one that is not there registers nothing, its missing imports still raise."""
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise


MODELS = LazyRegistry(
    "model",
    {
        "flux": "opensora.models.mmdit",
        "hunyuan_vae": "opensora.models.hunyuan_vae",
        "dc_ae": "opensora.models.dc_ae",
        "autoencoder_2d": "opensora.models.vae.autoencoder_2d",
        "text_embedder": "opensora.models.text",
        "N_Layer_discriminator_3D": "opensora.models.vae.discriminator",
    },
)
DATASETS = LazyRegistry(
    "dataset",
    {
        "text": "opensora.datasets.text",
        "video_text": "opensora.datasets.dataset",
        "cached_video_text": "opensora.encoded.dataset",
    },
)


def build_module(cfg: Mapping[str, Any] | nn.Module | None, registry: LazyRegistry, **overrides: Any) -> Any:
    """Build what a config section describes.

    Args:
        cfg: a section with ``type`` and constructor arguments (never changed), an already built module (returned as
            it is), or None (None is returned).
        registry: ``MODELS`` or ``DATASETS``.
        overrides: arguments that replace or complete those of the section.

    Raises:
        UserError: no ``type``, an unknown one, an argument that the type does not take, or one of another kind than
            the schema says.
        TypeError: ``cfg`` is none of the three.
    """
    if cfg is None or isinstance(cfg, nn.Module):
        return cfg
    if not isinstance(cfg, Mapping):
        raise TypeError(f"cannot build a {registry.name} from a {type(cfg).__name__}: expected a dict with `type`")
    arguments = {**{key: copy.deepcopy(value) for key, value in cfg.items()}, **overrides}
    name = arguments.pop("type", None)
    if name is None:
        raise UserError(f"a {registry.name} section has no `type`; known: {', '.join(registry.names)}")
    factory = registry.resolve(name)
    return factory(**_checked_arguments(name, factory, arguments))


def _checked_arguments(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the types of the schema; refuses those that the factory does not take, naming the nearest."""
    parameters = inspect.signature(factory).parameters
    valid = {key for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    options = {field.name: field for field in fields(COMPONENTS[name])} if name in COMPONENTS else {}
    if len(valid) < len(parameters) and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if name not in COMPONENTS:  # a user's own factory with **kwargs: only it can tell
            return dict(arguments)
        valid |= {*options, *RUNTIME_KEYS}
    for key in arguments:
        if key not in valid:
            groups = {key: field.metadata["group"] for key, field in options.items() if "group" in field.metadata}
            below = [f"{section}.{field.name}" for section, group in groups.items() for field in fields(group)]
            near = nearest_key(key, [*valid, *below])
            hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(sorted(valid))}"
            raise UserError(f"'{name}' takes no argument '{key}'; {hint}")
    return {key: _in_type(value, options.get(key), f"'{name}': {key}") for key, value in arguments.items()}


def _in_type(value: Any, option: Field | None, where: str) -> Any:
    """A value in the type that the schema gives its key; as it is where there is none."""
    if option is None:
        return value
    try:
        return coerce(value, option.type)
    except ValueError:
        raise UserError(f"{where} = {value!r}: expected {describe(option.type)}") from None
