"""Which kind of model a weight file holds, told by the names of its tensors."""

from collections.abc import Callable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# a tensor that only this kind has -> its ``type`` in a config, its name for people
KINDS = {
    "img_in.weight": ("flux", "an MMDiT"),
    "encoder.down_blocks.0.resnets.0.conv1.conv.weight": ("hunyuan_vae", "a causal video autoencoder"),
    "encoder.project_in.conv.weight": ("dc_ae", "a deep-compression video autoencoder"),
    "encoder.down.0.block.0.conv1.weight": ("autoencoder_2d", "an image autoencoder"),
}


def explain_other_kind(model_type: str, shapes: Shapes) -> list[str]:
    """A sentence about a file that is not of the configured kind; none if it is.

    Args:
        model_type: the kind that is configured, a ``type`` of `KINDS`.
        shapes: shape of every tensor in the file.
    """
    section = "model" if model_type == "flux" else "ae"
    found = [kind for key, kind in KINDS.items() if key in shapes]
    if any(kind == model_type for kind, _ in found):
        return []
    wanted = next(name for kind, name in KINDS.values() if kind == model_type)
    if found:
        kind, name = found[0]
        return [
            f"The file is {name} (type={kind!r}), not {wanted}: check {section}.from_pretrained and {section}.type."
        ]
    for key, (kind, _) in KINDS.items():
        prefix = next((name.removesuffix(key) for name in shapes if name.endswith(f".{key}")), None)
        if kind == model_type and prefix:
            return [f"The names in the file begin with {prefix!r}: write it again without that prefix."]
    return [f"The file is not {wanted}: check {section}.from_pretrained."]


def explain_autoencoder(
    model_type: str, config: Mapping[str, Any], fields_of: Callable[[Shapes], Mapping[str, Any]], shapes: Shapes
) -> list[str]:
    """Sentences that say how the autoencoder of a file differs from the configured one, and which key to set.

    Args:
        model_type: as in `explain_other_kind`.
        config: fields of the configured autoencoder, by their config keys.
        fields_of: those of the same fields that shapes reveal.
        shapes: shape of every tensor in the file.
    """
    other = explain_other_kind(model_type, shapes)
    if other:
        return other
    return [
        f"The file was made with {key}={value}, the config says {config[key]}: set ae.{key}={value}."
        for key, value in fields_of(shapes).items()
        if value != config[key]
    ]


def size(shapes: Shapes, key: str, axis: int = 0) -> int:
    """Length of a tensor along an axis; 0 where the file does not have it."""
    shape = shapes.get(key, ())
    return shape[axis] if len(shape) > axis else 0


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow ``prefix`` in the names of the file."""
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})
