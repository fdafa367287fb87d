"""Which kind of model a weight file holds, told by the names of its tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from opensora.config.options import ModelOptions
from opensora.registry import MODELS
from opensora.utils.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class WeightKind:
    """What tells the weight files of a registered model.

    Args:
        name: of the model, for people, with an article.
        tensor: a tensor that only these files have.
        section: of a config where the model stands.
        released: weights that the model gets where its config section has no ``from_pretrained``; None for random ones.
    """

    name: str
    tensor: str
    section: str = "ae"
    released: Callable[[Any], str | None] = lambda config: None

    def __call__(self, factory: Factory) -> Factory:
        """Declare, as a decorator, that a registered factory loads files of this kind."""
        factory.weight_kind = self  # type: ignore[attr-defined]
        return factory


def kind_of(factory: Callable[..., Any]) -> WeightKind | None:
    """What a registered factory declares; None for one that declares nothing."""
    return getattr(factory, "weight_kind", None)


def released_weights(section: ModelOptions) -> str | None:
    """Weights that the model of a config section gets without ``from_pretrained``; None for random ones."""
    kind = kind_of(MODELS.resolve(section.type))
    return None if kind is None else kind.released(section)


def known_kinds() -> Iterator[tuple[str, WeightKind]]:
    """``type`` and kind of all models that declare one. Imports them all; those that cannot be imported are no help."""
    for name in MODELS.names:
        try:
            kind = kind_of(MODELS.resolve(name))
        except (ImportError, UserError):
            continue
        if kind is not None:
            yield name, kind


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors are those of a LoRA adapter."""
    return any(".lora_" in name or ".lora." in name for name in names)


def explain_other_kind(model_type: str, shapes: Shapes) -> list[str]:
    """A sentence about a file that is not of the configured kind; none if it is.

    Args:
        model_type: the configured ``type``, which declares its :class:`WeightKind`.
        shapes: shape of every tensor in the file.
    """
    wanted = kind_of(MODELS.resolve(model_type))
    assert wanted is not None, model_type
    if wanted.tensor in shapes:
        return []
    where = f"check {wanted.section}.from_pretrained"
    if is_adapter(shapes):
        return [f"The file is a LoRA adapter, not {wanted.name}: {where}; adapters go to --pretrained-lora-path."]
    for found, kind in known_kinds():
        if kind.tensor in shapes:
            return [f"The file is {kind.name} (type={found!r}), not {wanted.name}: {where} and {wanted.section}.type."]
    prefix = next((key.removesuffix(wanted.tensor) for key in shapes if key.endswith(f".{wanted.tensor}")), None)
    if prefix:
        return [f"The names in the file begin with {prefix!r}: write it again without that prefix."]
    return [f"The file is not {wanted.name}: {where}."]


def explain_autoencoder(
    model_type: str, values: Mapping[str, Any], fields_of: Callable[[Shapes], Mapping[str, Any]], shapes: Shapes
) -> list[str]:
    """Sentences that say how the autoencoder of a file differs from the configured one, and which key to set.

    Args:
        model_type: as in `explain_other_kind`.
        values: those of the configured autoencoder, by their config keys.
        fields_of: those of the same fields that shapes reveal.
        shapes: shape of every tensor in the file.
    """
    other = explain_other_kind(model_type, shapes)
    if other:
        return other
    return [
        f"The file was made with {key}={value}, the config says {values[key]}: set ae.{key}={value}."
        for key, value in fields_of(shapes).items()
        if value != values[key]
    ]


def size(shapes: Shapes, key: str, axis: int = 0) -> int:
    """Length of a tensor along an axis; 0 where the file does not have it."""
    shape = shapes.get(key, ())
    return shape[axis] if len(shape) > axis else 0


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow ``prefix`` in the names of the file."""
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})
