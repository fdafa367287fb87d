"""Models filled with stored weights, strictly; a mismatch says what it is.

Models are built on the meta device and filled from the file, one tensor at a time, so that host memory stays close to
the size of the file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from opensora.utils.errors import UserError, shorten
from opensora.utils.logging import get_logger
from opensora.utils.weights import WeightFiles, check_finite, open_weights

logger = get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
Explain = Callable[[Shapes], list[str]]
Change = Callable[[str, Tensor], Tensor]
"""``change(name, tensor)``: what a parameter shall be, given what is stored."""
Pack = Callable[[str, Tensor], Mapping[str, Tensor]]


class Packing(Protocol):
    """How a model keeps its weights in another form than files do: see `opensora.models.quantization.loading`."""

    def stored_parts(self, weights: WeightFiles) -> set[str]:
        """Names of a file's tensors that have this form already."""

    def replace(self, model: nn.Module, weights: WeightFiles | None, dtype: torch.dtype | None) -> Pack:
        """Put what takes that form into a model on meta; returns what makes it of a stored tensor."""

    def replace_filled(self, model: nn.Module) -> None:
        """Give the weights of a model that form, one after the other."""


def check_match(
    model: nn.Module,
    weights: WeightFiles,
    *,
    explain: Explain | None = None,
    metadata: Mapping[str, str] | None = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> tuple[list[str], list[str]]:
    """Compare a model with a state dict on disk, before any tensor is read; arguments as in `load_model`.

    Returns:
        the tolerated missing keys and the tolerated unexpected keys.

    Raises:
        UserError: they differ; says how, and which config key to change.
    """
    own = model.state_dict()
    wanted = {key: tuple(value.shape) for key, value in own.items()}
    missing = [key for key in wanted if key not in weights.shapes]
    unexpected = [key for key in weights.shapes if key not in wanted]
    tolerated = (
        [key for key in missing if key.startswith(tuple(allow_missing))],
        [key for key in unexpected if key.startswith(tuple(allow_unexpected))],
    )
    problems = {
        "missing in the file": [key for key in missing if key not in tolerated[0]],
        "not in the model": [key for key in unexpected if key not in tolerated[1]],
        "of another shape": [
            f"{key} {[*weights.shapes[key]]} instead of {[*shape]}"
            for key, shape in wanted.items()
            if key in weights.shapes and weights.shapes[key] != shape
        ],
        "of integers, which are no weights (a quantised file cannot be loaded)": [
            key for key in wanted if not _is_of_type(key, own[key], weights)
        ],
    }
    hints = explain(weights.shapes) if explain and any(problems.values()) else []
    hints += [
        f"The file records {key}={weights.metadata[key]}, the config says {value}: "
        f"set model.{key}={weights.metadata[key]}, or convert the file."
        for key, value in (metadata or {}).items()
        if weights.metadata.get(key, value) != value and not any(f".{key}=" in hint for hint in hints)
    ]
    hints += [f"Tensors {kind}: {shorten(names)}." for kind, names in problems.items() if names]
    if hints:
        raise UserError("\n  ".join([f"The weights {weights.path} do not fit the configured model.", *hints]))
    return tolerated


def _is_of_type(key: str, value: Tensor, weights: WeightFiles) -> bool:
    return key not in weights.shapes or not value.is_floating_point() or weights.is_floating_point(key)


def check_file(model: nn.Module, path: str | Path, cache_dir: str | None = None) -> None:
    """Compare weights on disk with a model that `load_model` built on the meta device; others are only opened.

    Raises:
        UserError: none there, damaged ones, or of another model.
    """
    weights = open_weights(path, cache_dir)
    compare: Any = getattr(model, "compare_weights", None)
    if compare is not None:
        compare(model, weights)


def _filled(shape: torch.Size, value: float | None, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """A tensor that a file lacks: constant, or drawn as the weights of a new linear layer (whose biases are zero)."""
    if value is not None or len(shape) < 2:
        return torch.full(shape, value or 0.0, dtype=dtype, device=device)
    bound = shape[1] ** -0.5
    return torch.empty(shape, device="cpu").uniform_(-bound, bound).to(device, dtype)


def load_model(
    build: Callable[[], Model],
    from_pretrained: str | Path | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    explain: Explain | None = None,
    metadata: Mapping[str, str] | None = None,
    allow_missing: Mapping[str, float | None] | None = None,
    allow_unexpected: Sequence[str] = (),
    cache_dir: str | None = None,
    packing: Packing | None = None,
    change: Change | None = None,
) -> Model:
    """Build a model and fill it with the weights at ``from_pretrained``; nothing is initialised only to be overwritten.

    Args:
        build: makes the model; called with the meta device as default. A module that has buffers which are not in its
            state dict must offer ``reset_buffers(device)`` to compute them; other tensors it keeps must not be made in
            its constructor.
        from_pretrained: weights, see `open_weights`; empty for a new model, freshly initialised.
        device: where the weights go; "meta" builds the model without memory. `check_file` compares such a new one with
            a file as this function would; with a file, `stored_weights` reads what the model is to be filled with.
        dtype: dtype of floating-point weights; None keeps the file's.
        explain: given the shapes in the file, says which config keys disagree (one sentence each).
        metadata: layouts the model expects, checked against those that the file records (if it does).
        allow_missing: prefixes of keys that the file may lack, and the constant they are filled with; None fills them
            as a new linear layer is, from torch's global stream.
        allow_unexpected: prefixes of keys that the file may have beyond the model's.
        cache_dir: cache of downloads.
        packing: form of the weights in the model, if another than the file's. Tensors take it as they are read, so that
            the model never exists in the file's.
        change: what is done to every parameter before that.

    Raises:
        UserError: no such file, an unreadable one, one that does not fit, or weights that are not finite; says what to
            do.
    """
    compare = partial(
        check_match,
        explain=explain,
        metadata=metadata,
        allow_missing=allow_missing or (),
        allow_unexpected=allow_unexpected,
    )
    if not from_pretrained:
        return _load_random(build, device, dtype, compare, packing, change)
    weights = open_weights(from_pretrained, cache_dir)
    with torch.device("meta"):
        model = build()
    parts = packing.stored_parts(weights) if packing is not None else set()
    pack: Pack | None = packing.replace(model, weights, dtype) if packing is not None and parts else None
    missing, unexpected = compare(model, weights)
    if torch.device(device).type == "meta":
        model = model.to(dtype=dtype)
        model.stored = StoredWeights(weights, unexpected, _new(model, missing, allow_missing, weights, "cpu", dtype))  # type: ignore[assignment]
        return model
    if packing is not None and not parts:
        pack = packing.replace(model, weights, dtype)
    state: dict[str, Tensor] = {}
    for key, tensor in weights.tensors(device, dtype, skip=unexpected, as_stored=parts):
        check_finite(key, tensor, weights.path)
        changed = tensor if change is None or key in parts else change(key, tensor)
        state |= {key: changed} if pack is None else pack(key, changed)
        del tensor, changed  # before the next one is read
    state |= _new(model, missing, allow_missing, weights, device, dtype)
    if unexpected:
        logger.info("Left out from %s: %s", weights.path, shorten(unexpected))
    return fill(model, state, device)


def _new(
    model: nn.Module,
    missing: Iterable[str],
    allowed: Mapping[str, float | None] | None,
    weights: WeightFiles,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Parameters that a file lacks, by name."""
    found = {}
    for key in missing:
        value = next(value for prefix, value in (allowed or {}).items() if key.startswith(prefix))
        found[key] = _filled(model.get_parameter(key).shape, value, device, dtype)
        logger.info("%s is not in %s: %s", key, weights.path, "new" if value is None else f"filled with {value:g}")
    return found


@dataclass(frozen=True)
class StoredWeights:
    """What a model on meta is to be filled with.

    Attributes:
        files: where its weights are.
        unexpected: tensors there that the model does not have.
        new: tensors of the model that are not there.
    """

    files: WeightFiles
    unexpected: Sequence[str]
    new: Mapping[str, Tensor]

    def tensors(self, cut: Change) -> Iterator[tuple[str, Tensor]]:
        """``cut(name, whole)`` of every tensor of the model, as the file has it: of whole ones that are parts of mapped
        files, only what is cut out is read."""
        yield from self.files.tensors(skip=self.unexpected, cut=cut)
        for key, value in self.new.items():
            yield key, cut(key, value)


def stored_weights(model: nn.Module) -> StoredWeights | None:
    """What a model is to be filled with that `load_model` has built on meta, given a file; None for others."""
    found = getattr(model, "stored", None)
    return found if isinstance(found, StoredWeights) else None


def _load_random(
    build: Callable[[], Model],
    device: torch.device | str,
    dtype: torch.dtype | None,
    compare: Callable[[nn.Module, WeightFiles], object],
    packing: Packing | None,
    change: Change | None,
) -> Model:
    """A new model; on meta one that knows how to compare itself with a file."""
    with torch.device(device):
        model = build().to(dtype=dtype)
    if torch.device(device).type == "meta":
        model.compare_weights = partial(_compare, build, compare, packing)  # type: ignore[assignment]
        return model
    if change is not None:
        for key, parameter in model.named_parameters():
            parameter.data = change(key, parameter.data)
    if packing is not None:
        packing.replace_filled(model)
    return model


def _compare(
    build: Callable[[], nn.Module],
    compare: Callable[[nn.Module, WeightFiles], object],
    packing: Packing | None,
    model: nn.Module,
    weights: WeightFiles,
) -> None:
    """Compare a model on meta with a file, in the form that its weights have there."""
    if packing is not None and packing.stored_parts(weights):
        with torch.device("meta"):
            model = build()
        packing.replace(model, weights, None)
    compare(model, weights)


def fill(model: Model, state: Mapping[str, Tensor], device: torch.device | str) -> Model:
    """Give a model on meta its tensors, and compute its buffers that are in no file."""
    model.load_state_dict(state, assign=True)
    reset_buffers(model, device, lambda buffer: buffer.is_meta)
    return model


def reset_buffers(model: nn.Module, device: torch.device | str, lost: Callable[[Tensor], bool]) -> None:
    """Have modules compute those of their buffers that are in no file, where ``lost`` says so of one."""
    for name, module in model.named_modules():
        outside = module._non_persistent_buffers_set
        if any(lost(buffer) for key, buffer in module.named_buffers(recurse=False) if key in outside):
            reset = getattr(module, "reset_buffers", None)
            assert callable(reset), f"{name} has buffers outside its state dict and no reset_buffers(device)"
            reset(torch.device(device))
