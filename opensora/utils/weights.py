"""Stored weights: find them, and read them lean.

Reads safetensors files, ``.pt`` / ``.pth`` / ``.bin`` files (tensors only), and folders of shards with an index, as
written by Hugging Face or by a training run.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.utils import hub
from opensora.utils.errors import UserError, first_line, shorten
from opensora.utils.paths import INDEX_SUFFIX, read_text

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
CHECKPOINT = re.compile(r"epoch\d+-global_step\d+")  # a folder that training writes
EMA_NAME = "ema.safetensors"  # averaged weights in a training checkpoint
SAMPLED = 1 << 16  # bytes hashed at each place of a large file or tensor
PLACES, TENSOR_PLACES = 64, 3
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before 1.6
MOST_READ = 1 << 28
# codes without sign from which on these types have no numbers, and how many are looked at together
FP8_NOT_FINITE = MappingProxyType({torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C})
FP8_PART = 1 << 22
SMALL = 1 << 23  # files up to this many bytes are hashed whole


def index_of(file: str | Path) -> Path:
    """Where the index of shards is that stand for a weight file."""
    file = Path(file)
    return file.with_name(file.name + INDEX_SUFFIX)


def is_stored(file: str | Path) -> bool:
    """Whether weights are at a path: the file itself, or shards that stand for it."""
    return Path(file).is_file() or index_of(file).is_file()


def is_hub_path(path: str | Path) -> bool:
    """Whether a path that is not there leads to the Hugging Face hub: ``org/repo/path/in/repo``, with no folder ``org``
    here, and none of a checkpoint of training in it."""
    parts = str(path).split("/")
    local = parts[0] in (".", "..", "~") or "" in parts[:-1] or Path(parts[0]).exists()
    return len(parts) >= 3 and not local and not any(CHECKPOINT.fullmatch(part) for part in parts)


def _on_hub(path: str | Path) -> tuple[str, str, bool]:
    """(repository, path in it, whether that is a file)."""
    parts = str(path).split("/")
    inside = "/".join(parts[2:])
    return "/".join(parts[:2]), inside, inside.endswith(WEIGHT_SUFFIXES)


def check_on_hub(path: str | Path, cache_dir: str | None = None) -> None:
    """See that a hub path is in the cache or on the hub, without a download; raises a UserError otherwise."""
    hub.download(*_on_hub(path), cache_dir, only_look=True)


def resolve_path(path: str | Path, cache_dir: str | None = None) -> Path:
    """Local file or folder of a weight path: what exists locally comes first, then the Hugging Face hub.

    In place of a file there may be shards of it with an index; then the path of that.

    Args:
        path: local path, or ``org/repo/path/in/repo`` on the hub (a file, or a folder of shards).
        cache_dir: where downloads are kept; None for the library's default.

    Raises:
        UserError: neither a local path nor on the hub; names the command that downloads a released file.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"weights {path!r}: give a path, or org/repo/path of a hub, as text")
    local = Path(path).expanduser()
    if local.exists():
        return local
    if index_of(local).is_file():
        return index_of(local)
    if is_hub_path(path):
        return hub.download(*_on_hub(path), cache_dir)
    command = hub.download_command(local)
    hint = f"Download it with:\n  {command}" if command else "Check the path (relative to the current folder)."
    raise UserError(f"No weights at {path}. {hint}")


@dataclass
class WeightFiles:
    """One state dict on disk, in one or several files, whose tensors are read on demand.

    `shapes` has every tensor's shape, `dtypes` its type as the file calls it (``BF16``, ``float32``), `metadata` what
    the writer recorded (all known before any tensor is read).
    """

    path: Path
    files: list[Path]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in self.files:
            if file.suffix in PICKLE_SUFFIXES:
                for key, value in _read_pickle(file).items():
                    self.shapes[key] = tuple(value.shape)
                    self.dtypes[key] = str(value.dtype).removeprefix("torch.")
                continue
            with _open_safetensors(file) as opened:
                self.metadata.update(opened.metadata() or {})
                for key in opened.keys():  # noqa: SIM118
                    stored = opened.get_slice(key)
                    self.shapes[key], self.dtypes[key] = tuple(stored.get_shape()), stored.get_dtype()

    def is_floating_point(self, key: str) -> bool:
        """Whether a tensor holds numbers with a fraction."""
        return self.dtypes[key].lower().startswith(("f", "bf"))

    def tensors(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        skip: Iterable[str] = (),
        as_stored: Collection[str] = (),
        cut: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, on ``device``, floating-point ones in ``dtype`` (None keeps the file's), but not those named in
        ``as_stored``. ``cut(name, tensor)`` is taken of each first: a part of it, say, so that the rest is never read.

        A tensor that needs neither conversion nor transfer stays a view of the mapped file (copied only if it is
        written to).
        """
        skipped = set(skip)

        def convert(key: str, tensor: Tensor) -> Tensor:
            tensor = tensor if cut is None else cut(key, tensor)
            return tensor.to(device, dtype if tensor.is_floating_point() and key not in as_stored else None)

        for file in self.files:
            if file.suffix in PICKLE_SUFFIXES:
                yield from (
                    (key, convert(key, value)) for key, value in _read_pickle(file).items() if key not in skipped
                )
                continue
            opened = _open_safetensors(file)
            for key in list(opened.keys()):
                if key in skipped:
                    continue
                tensor = opened.get_tensor(key)
                converted = convert(key, tensor)
                if converted is not tensor:  # map the file anew, so that the pages read so far can be freed
                    del tensor
                    opened = _open_safetensors(file)
                yield key, converted

    def fingerprint(self) -> str:
        """SHA-256 that equal weights share, whatever files they are in: names, types and shapes of all tensors, and
        samples of every one of them, so that a large model takes seconds."""
        digests = {key: _tensor_digest(tensor) for key, tensor in self.tensors()}
        return hashlib.sha256("".join(f"{key}:{digests[key]};" for key in sorted(digests)).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor: its type, its shape, all of its bytes or those of its beginning, middle and end."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    last = max(content.numel() - SAMPLED, 0)
    for place in sorted({last * i // (TENSOR_PLACES - 1) for i in range(TENSOR_PLACES)}):
        digest.update(content[place : place + SAMPLED].numpy().tobytes())
    return digest.hexdigest()


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Refuse a tensor with NaN or infinity, in one pass over it and without room for a copy.

    Raises:
        UserError: names the tensor and the file.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return
    if not all_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: {name} is not finite (NaN or infinity): the weights are damaged, or too large for {dtype}"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinity; also of fp8, which torch does not look into."""
    if not tensor.numel():
        return True
    if tensor.itemsize > 1:
        least, most = torch.aminmax(tensor)  # both are NaN if any is
        return bool(torch.isfinite(least) & torch.isfinite(most))
    parts = tensor.flatten().split(FP8_PART)
    first = FP8_NOT_FINITE.get(tensor.dtype)
    if first is None:
        return all(all_finite(part.float()) for part in parts)
    return all(int(part.view(torch.uint8).bitwise_and(0x7F).max()) < first for part in parts)


def fingerprint(path: str | Path, cache_dir: str | None = None) -> str:
    """What identifies the weights that `open_weights` finds at ``path``, see :meth:`WeightFiles.fingerprint`."""
    return open_weights(path, cache_dir).fingerprint()


def files_hash(path: str | Path, cache_dir: str | None = None) -> str:
    """Hash of a file or of a folder's files, with names and sizes: all of small files, samples of large ones.

    20 GB take no longer than a few megabytes. Caches name the encoders that they were made with by it, so what it gives
    stays as it is; what tells weights apart whatever files they are in is :func:`fingerprint`.

    Raises:
        UserError: no weights there.
    """
    found = resolve_path(path, cache_dir)
    files = [found] if found.is_file() else sorted(file for file in found.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(found) if file != found else ''}:{size};".encode())
        with file.open("rb") as opened:
            places = [0] if size <= SMALL else [size * i // PLACES for i in range(PLACES)]
            for place in places:
                opened.seek(place)
                digest.update(opened.read(size if size <= SMALL else SAMPLED))
    return digest.hexdigest()[:16]


def read_header(file: Path) -> dict[str, Any]:
    """Header of a safetensors file: types, shapes and places of its tensors by name, and ``__metadata__``."""
    with file.open("rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))


def _open_safetensors(file: Path):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as raw:
            start = raw.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`.") from error
        if zipfile.is_zipfile(file):
            raise UserError(f"{file} was written by torch.save: give it the suffix .pt, not .safetensors.") from error
        raise UserError(
            f"{file} is truncated or not a safetensors file ({error}): download or write it again."
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if _is_safetensors(file):
            raise UserError(f"{file} is a safetensors file: give it the suffix .safetensors.") from error
        # what torch says is long, and its advice is to run the code in the file
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{file} is damaged or holds more than tensors{what}, which is not loaded since it may run code: write it "
            "again with torch.save(model.state_dict(), ...) or as safetensors."
        ) from error
    except Exception as error:  # whatever a reader of pickles stumbles over
        reason = (first_line(error) or type(error).__name__).split(". ")[0]
        raise UserError(f"{file} is truncated or not a file of torch.save ({reason}): get it again.") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} does not hold a state dict (names and tensors).")
    return content


def is_costly(file: Path) -> bool:
    """Whether names and shapes of a weight file cost as much as its tensors: a large one of a torch before 1.6, which
    has to be read whole."""
    if file.suffix not in PICKLE_SUFFIXES or not file.is_file() or zipfile.is_zipfile(file):
        return False
    with file.open("rb") as opened:
        return opened.read(len(OLD_PICKLE)) == OLD_PICKLE and file.stat().st_size > MOST_READ


def _is_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def open_weights(path: str | Path, cache_dir: str | None = None) -> WeightFiles:
    """Open the state dict at ``path`` (see `resolve_path`) without reading its tensors.

    A folder is searched for an index of shards or a single weight file, first in its ``model`` sub-folder (a training
    checkpoint), then in itself. An index may be named itself.

    Raises:
        UserError: nothing there, a missing shard, one shard of several, or a file that is truncated or of another kind.
    """
    found = resolve_path(path, cache_dir)
    if found.name.endswith(INDEX_SUFFIX):
        return _open_index(found)
    if found.is_file():
        _refuse_shard(found)
        if found.suffix not in WEIGHT_SUFFIXES:
            raise UserError(f"{found} is not a weight file; expected one of {', '.join(WEIGHT_SUFFIXES)} or a folder.")
        return WeightFiles(found, [found])
    for folder in (found / "model", found):  # a training checkpoint also has an EMA file beside its `model` folder
        if folder == found:
            _refuse_averaged(found)
        indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
        singles = sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
        if indices:
            return _open_index(indices[0])
        if len(singles) == 1:
            return WeightFiles(folder, singles)
        if singles:
            names = ", ".join(file.name for file in singles)
            raise UserError(f"{folder} has several weight files and no index ({names}): name one of them.")
    checkpoints = sorted(folder.name for folder in found.glob("epoch*-global_step*"))
    hint = f" Name one of its checkpoints: {shorten(checkpoints)}." if checkpoints else ""
    if (found / "lora").is_dir():
        hint = f" It holds an adapter: name the model that it was trained on, and --pretrained-lora-path {found}/lora."
    raise UserError(f"{found} holds no weights: no *.index.json and no {' / '.join(WEIGHT_SUFFIXES)} file.{hint}")


def _refuse_averaged(folder: Path) -> None:
    """A checkpoint whose weights are gone would give its averaged ones instead, unasked.

    Raises:
        UserError: all that there is are averaged weights.
    """
    weights = [file for file in folder.glob("*") if file.name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
    averaged = [file for file in weights if file.name.startswith(EMA_NAME)]
    if averaged and len(averaged) == len(weights):
        raise UserError(
            f"{folder} is a checkpoint without its folder model, only its averaged weights are there: name "
            f"{folder / EMA_NAME} to use them, or another checkpoint."
        )


def _refuse_shard(file: Path) -> None:
    """A part of a model would be told as a model of another kind.

    Raises:
        UserError: an index beside the file says that it is one shard of several.
    """
    for index in file.parent.glob(f"*{INDEX_SUFFIX}"):
        shards = set(_read_index(index)["weight_map"].values())
        if file.name in shards and len(shards) > 1:
            raise UserError(f"{file} is one of {len(shards)} shards of {index.name}: name the folder {file.parent}.")


def _read_index(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(index))
        return {**content, "weight_map": dict(content["weight_map"])}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index} is not an index of weight shards ({error}).") from error


def _open_index(index: Path) -> WeightFiles:
    content = _read_index(index)
    weight_map = content["weight_map"]
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{index} names shards that are not there: {', '.join(absent)}.")
    weights = WeightFiles(index.parent, files)
    lost = sorted(set(weight_map) - set(weights.shapes))
    if lost:
        raise UserError(f"{index} names tensors that no shard has: {shorten(lost)}.")
    recorded = content.get("metadata") or {}
    weights.metadata.update((key, str(value)) for key, value in recorded.items() if not isinstance(value, dict | list))
    return weights


def load_state_dict(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, cache_dir: str | None = None
) -> dict[str, Tensor]:
    """State dict at ``path`` (see `open_weights`), on ``device``, floating-point tensors in ``dtype`` if given."""
    return dict(open_weights(path, cache_dir).tensors(device, dtype))
