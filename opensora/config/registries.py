"""Registered modules by name: where each lives, and which option group configures it. Knows no torch.

To add one to the package, add its line; a user's own module registers itself (``docs/extending.md``).
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mmengine.registry import Registry

from opensora.config.choices import check_whole, is_again
from opensora.config.options import DatasetOptions, ModelOptions, Options, check_group
from opensora.utils.errors import UserError


class Entry(NamedTuple):
    """A registered module of the package.

    Attributes:
        module: imported when the module is built; registers it.
        config: its option group as ``module:Class``, imported without torch when a config is read.
        roles: which sections of a config it may stand in.
    """

    module: str
    config: str
    roles: tuple[str, ...]


class LazyRegistry(Registry):
    """A registry that knows in which module each shipped name lives and imports only that one.

    Asking for ``flux`` must not import the autoencoders, the datasets or anything else; names registered by a
    user's own module (``@MODELS.register_module("name", config=Group)``) work as in any mmengine registry.
    """

    def __init__(self, name: str, entries: Mapping[str, Entry], base: type[Options]) -> None:
        super().__init__(name)
        self.base = base  # option group of a section whose type has none
        self.entries = MappingProxyType(dict(entries))
        self._configs: dict[str, type] = {}

    @property
    def names(self) -> list[str]:
        """Every name that can be built, imported or not, in alphabetical order."""
        return sorted({*self.entries, *self.module_dict})

    @property
    def own(self) -> list[str]:
        """Names that a user's own modules registered."""
        return sorted(set(self.module_dict) - set(self.entries))

    def with_role(self, role: str) -> list[str]:
        """Shipped names that may stand in a section of this role."""
        return [name for name, entry in self.entries.items() if role in entry.roles]

    def register_module(
        self,
        name: str | list[str] | None = None,
        force: bool = False,
        module: type | None = None,
        config: type | None = None,
    ) -> Any:
        """Register a factory; as mmengine's, and with the option group that it takes as its first argument.

        Without ``config`` the keys of a section reach the factory as keyword arguments.

        Raises:
            UserError: the name is taken by another factory, a class lacks methods of its contract, or ``config`` is no
                option group.
        """

        def register(factory: Any) -> Any:
            names = [name] if isinstance(name, str) else name or [factory.__name__]
            for key in names:
                check_whole(f"the {self.name} {key!r}", factory)
                if config is not None:
                    check_group(config, self.base, f"the {self.name} {key!r}")
                if not force and self._is_taken(key, factory):
                    raise UserError(f"the {self.name} {key!r} is there already: register yours under another name")
            super(LazyRegistry, self).register_module(names, True, factory)
            self._configs = {key: group for key, group in self._configs.items() if key not in names}
            self._configs.update(dict.fromkeys(names, config) if config is not None else {})
            return factory

        return register if module is None else register(module)

    def _is_taken(self, name: str, factory: Any) -> bool:
        """Whether a name stands for another factory, imported or not."""
        if name in self.module_dict:
            return not is_again(self.module_dict[name], factory)
        return name in self.entries and factory.__module__ != self.entries[name].module

    def config_of(self, name: str) -> type | None:
        """Option group of a registered name; None for names that have none."""
        if name in self._configs or name not in self.entries:
            return self._configs.get(name)
        module, _, group = self.entries[name].config.partition(":")
        return getattr(importlib.import_module(module), group)

    def resolve(self, name: str) -> Callable[..., Any]:
        """Factory registered as ``name``; imports its module first if need be.

        Raises:
            UserError: nothing of that name; names the nearest one.
        """
        if not isinstance(name, str):
            raise UserError(f"type {name!r} is not a registered {self.name}; known: {', '.join(self.names)}")
        if name not in self.module_dict and name in self.entries:
            self._import(self.entries[name].module)
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


PLACE = "opensora.models"
MODELS = LazyRegistry(
    "model",
    {
        "flux": Entry(f"{PLACE}.mmdit.model", f"{PLACE}.mmdit.config:MMDiTConfig", ("diffusion",)),
        "hunyuan_vae": Entry(
            f"{PLACE}.hunyuan_vae.autoencoder", f"{PLACE}.hunyuan_vae.config:HunyuanVAEConfig", ("autoencoder",)
        ),
        "dc_ae": Entry(f"{PLACE}.dc_ae.autoencoder", f"{PLACE}.dc_ae.config:DCAEConfig", ("autoencoder",)),
        "autoencoder_2d": Entry(
            f"{PLACE}.vae.autoencoder_2d",
            f"{PLACE}.vae.config:AutoEncoder2DConfig",
            ("autoencoder", "image autoencoder"),
        ),
        "text_embedder": Entry(f"{PLACE}.text.embedder", f"{PLACE}.text.config:TextEmbedderConfig", ("text",)),
        "N_Layer_discriminator_3D": Entry(
            f"{PLACE}.vae.discriminator", f"{PLACE}.vae.config:DiscriminatorConfig", ("discriminator",)
        ),
    },
    ModelOptions,
)
DATASETS = LazyRegistry(
    "dataset",
    {
        "text": Entry("opensora.datasets.text", "opensora.datasets.config:TextConfig", ("prompts",)),
        "video_text": Entry("opensora.datasets.dataset", "opensora.datasets.config:VideoTextConfig", ("clips",)),
        "cached_video_text": Entry(
            "opensora.encoded.dataset", "opensora.encoded.config:CachedVideoTextConfig", ("clips",)
        ),
        "trajectories": Entry(
            "opensora.encoded.trajectories", "opensora.encoded.config:TrajectoriesConfig", ("clips",)
        ),
    },
    DatasetOptions,
)
REGISTRIES = MappingProxyType({"model": MODELS, "dataset": DATASETS})
