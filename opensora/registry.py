"""Registered modules by name, and the one function that builds them from a config section."""

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from mmengine.registry import Registry
from torch import nn

from opensora.schema_sections import COMPONENTS
from opensora.utils.errors import UserError

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
        "cached_video_text": "opensora.datasets.caches",
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
        UserError: no ``type``, an unknown one, or an argument that the type does not take.
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
    _check_arguments(name, factory, arguments)
    return factory(**arguments)


def _check_arguments(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the factory does not take, with the nearest one that it does."""
    parameters = inspect.signature(factory).parameters
    valid = {key for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if len(valid) < len(parameters) and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if name not in COMPONENTS:  # a user's own factory with **kwargs: only it can tell
            return
        valid |= {field.name for field in fields(COMPONENTS[name])} | set(RUNTIME_KEYS)
    for key in arguments:
        if key not in valid:
            near = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(sorted(valid))}"
            raise UserError(f"'{name}' takes no argument '{key}'; {hint}")
