"""What a file or folder of weights holds, from headers and configs: no tensor is read, nothing in a file is run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from opensora.models.kinds import is_adapter, known_kinds
from opensora.models.text.files import NAMES, encoder_kind, weight_files
from opensora.utils.errors import UserError
from opensora.utils.weights import WeightFiles, index_of, is_costly, open_weights


@dataclass(frozen=True)
class Holding:
    """What is at a path.

    Attributes:
        path: as given.
        what: in words, with an article: "an MMDiT", "a T5 text encoder", "a LoRA adapter", "a checkpoint of training".
        model_type: registered ``type`` of a model that has such weights, None for an unknown one.
        shapes: of all tensors, by name; empty where only reading all of them would tell.
        dtypes: how many tensors are of each type.
        parts: what else belongs to a checkpoint: ``model``, ``ema``, ``lora``, ``optimizer``.
    """

    path: Path
    what: str
    model_type: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line for people."""
        types = ", ".join(f"{count} of {name}" for name, count in self.dtypes.most_common())
        tensors = f", {len(self.shapes)} tensors ({types})" if self.shapes else ""
        beside = f" with {', '.join(self.parts)}" if self.parts else ""
        return f"{self.what}{tensors}{beside}"


def inspect(path: str | Path) -> Holding:
    """Say what a local file or folder holds.

    Raises:
        UserError: nothing there, or files that cannot be read.
    """
    found = Path(path).expanduser()
    if not found.exists() and not index_of(found).is_file():
        raise UserError(f"No weights at {path}. Check the path (relative to the current folder).")
    if (found / "config.json").is_file() and not (found / "model").is_dir():
        with_config = _encoder(found)
        if with_config is not None:
            return with_config
    if (found / "adapter_config.json").is_file():
        files = sorted(file for file in found.glob("adapter_model.*") if file.is_file())
        return _holding(found, WeightFiles(found, files[:1]), "a LoRA adapter in PEFT's format")
    parts = _parts(found)
    if parts and "model" not in parts:
        return Holding(found, "a checkpoint of training without its model", parts=parts)
    if is_costly(found):
        return Holding(found, "a file of torch.save before 1.6")
    stored = open_weights(found)
    held = _holding(found, stored, *_kind(stored.shapes))
    return replace(held, what=f"a checkpoint of {held.what}", parts=parts) if parts else held


def _encoder(folder: Path) -> Holding | None:
    try:
        kind = encoder_kind(str(folder))
    except UserError:
        return None
    stored = weight_files(folder)
    what = f"{NAMES[kind]} text encoder"
    return Holding(folder, what, "text_embedder") if stored is None else _holding(folder, stored, what, "text_embedder")


def _parts(folder: Path) -> tuple[str, ...]:
    """Parts of a checkpoint of training; none for another folder."""
    if not (folder / "running_states.json").is_file():
        return ()
    there = {"model": "model", "ema": "ema.safetensors", "lora": "lora", "optimizer": "optimizer"}
    return tuple(part for part, name in there.items() if (folder / name).exists() or index_of(folder / name).exists())


def _kind(names: Iterable[str]) -> tuple[str, str | None]:
    names = set(names)
    if is_adapter(names):
        return "a LoRA adapter", None
    for model_type, kind in known_kinds():
        if kind.tensor in names:
            return kind.name, model_type
    return "weights of an unknown kind", None


def _holding(path: Path, stored: WeightFiles, what: str, model_type: str | None = None) -> Holding:
    return Holding(path, what, model_type, stored.shapes, Counter(stored.dtypes.values()))
