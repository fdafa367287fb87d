"""Weights in and out of models: find a file, read it lean, load it strictly, write it whole.

Reads safetensors files, ``.pt`` / ``.pth`` / ``.bin`` files (tensors only), and folders of shards with an index, as
written by Hugging Face or by a training run. Models are built on the meta device and filled from the file, one tensor
at a time, so that host memory stays close to the size of the file.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.utils import hub
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
Explain = Callable[[Shapes], list[str]]

VIDEO_REPO = "hpcai-tech/Open-Sora-v2"
# released file or folder -> repository that has it, and its path there
RELEASED = {
    "Open_Sora_v2.safetensors": (VIDEO_REPO, "Open_Sora_v2.safetensors"),
    "hunyuan_vae.safetensors": (VIDEO_REPO, "hunyuan_vae.safetensors"),
    "flux1-dev.safetensors": (VIDEO_REPO, "flux1-dev.safetensors"),
    "flux1-dev-ae.safetensors": (VIDEO_REPO, "flux1-dev-ae.safetensors"),
    "t5-v1_1-xxl": (VIDEO_REPO, "google/t5-v1_1-xxl"),
    "clip-vit-large-patch14": (VIDEO_REPO, "openai/clip-vit-large-patch14"),
    "flux1-dev-fused-rope.safetensors": ("hpcai-tech/flux1-dev-fused-rope", "flux1-dev-fused-rope.safetensors"),
    "Open_Sora_v2_Video_DC_AE.safetensors": (f"{VIDEO_REPO}-Video-DC-AE", "Open_Sora_v2_Video_DC_AE.safetensors"),
    "F32T4C128_AE.safetensors": (f"{VIDEO_REPO}-Video-DC-AE", "F32T4C128_AE.safetensors"),
    "ae.safetensors": ("black-forest-labs/FLUX.1-dev", "ae.safetensors"),
}
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
INDEX_SUFFIX = ".index.json"  # after the name of the file that the shards stand for


def download_command(path: str | Path) -> str | None:
    """Command that downloads a released file or folder to ``path``, None if the name is not a released one."""
    path = Path(path)
    if path.name not in RELEASED:
        return None
    repo, inside = RELEASED[path.name]
    folder = path.parents[inside.count("/")] if len(path.parents) > inside.count("/") else Path()
    if Path(inside).suffix:
        return f"hf download {repo} {inside} --local-dir {folder}"
    return f'hf download {repo} --include "{inside}/*" --local-dir {folder}'


def index_of(file: str | Path) -> Path:
    """Where the index of shards is that stand for a weight file."""
    file = Path(file)
    return file.with_name(file.name + INDEX_SUFFIX)


def is_stored(file: str | Path) -> bool:
    """Whether weights are at a path: the file itself, or shards that stand for it."""
    return Path(file).is_file() or index_of(file).is_file()


def resolve_path(path: str | Path, cache_dir: str | None = None) -> Path:
    """Local file or folder of a weight path: what exists locally comes first, then the Hugging Face hub.

    In place of a file there may be shards of it with an index; then the path of that.

    Args:
        path: local path, or ``org/repo/path/in/repo`` on the hub (a file, or a folder of shards).
        cache_dir: where downloads are kept; None for the library's default.

    Raises:
        UserError: neither a local path nor on the hub; names the command that downloads a released file.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if index_of(local).is_file():
        return index_of(local)
    parts = str(path).split("/")
    if len(parts) >= 3 and parts[0] not in ("", ".", "..", "~") and not Path(parts[0]).exists():
        return _download("/".join(parts[:2]), "/".join(parts[2:]), cache_dir)
    command = download_command(local)
    hint = f"Download it with:\n  {command}" if command else "Check the path (relative to the current folder)."
    raise UserError(f"No weights at {path}. {hint}")


def _download(repo: str, inside: str, cache_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    logger.info("Looking for %s in the Hugging Face repository %s", inside, repo)
    is_file, offline = inside.endswith(WEIGHT_SUFFIXES), not hub.is_reachable()
    try:
        if is_file:
            return Path(hf_hub_download(repo, inside, cache_dir=cache_dir, local_files_only=offline))
        wanted = f"{inside}/*"
        found = snapshot_download(repo, allow_patterns=wanted, cache_dir=cache_dir, local_files_only=offline)
        folder = Path(found) / inside
        if not folder.is_dir():
            raise FileNotFoundError(f"it has no folder {inside}")
        return folder
    except Exception as error:  # the library has a dozen kinds: offline, gated, no such repository, no such file, ...
        if offline:
            what = inside if is_file else f'--include "{inside}/*"'
            reason = (
                "it was not downloaded before, and the Hugging Face hub cannot be reached. Where it can, download it "
                f"with:\n  hf download {repo} {what} --local-dir {repo}"
            )
        else:
            reason = (
                f"the Hugging Face repository {repo} did not give {inside} "
                f"({type(error).__name__}: {_first_line(error)})."
            )
        raise UserError(f"No weights at {repo}/{inside}: there is no such local path, and {reason}") from error


@dataclass
class WeightFiles:
    """One state dict on disk, in one or several files, whose tensors are read on demand.

    `shapes` has every tensor's shape, `metadata` what the writer recorded (both known before any tensor is read).
    """

    path: Path
    files: list[Path]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in self.files:
            if file.suffix in PICKLE_SUFFIXES:
                self.shapes.update((key, tuple(value.shape)) for key, value in _read_pickle(file).items())
                continue
            with _open_safetensors(file) as opened:
                self.metadata.update(opened.metadata() or {})
                self.shapes.update((key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys())  # noqa: SIM118

    def tensors(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, skip: Iterable[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, on ``device``, floating-point ones in ``dtype`` (None keeps the file's).

        A tensor that needs neither conversion nor transfer stays a view of the mapped file (copied only if it is
        written to).
        """
        skipped = set(skip)

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        for file in self.files:
            if file.suffix in PICKLE_SUFFIXES:
                yield from ((key, convert(value)) for key, value in _read_pickle(file).items() if key not in skipped)
                continue
            opened = _open_safetensors(file)
            for key in list(opened.keys()):
                if key in skipped:
                    continue
                tensor = opened.get_tensor(key)
                converted = convert(tensor)
                if converted is not tensor:  # map the file anew, so that the pages read so far can be freed
                    del tensor
                    opened = _open_safetensors(file)
                yield key, converted


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
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = _first_line(error).split(". ")[0]
        raise UserError(f"{file} is truncated or not a file of torch.save ({reason}): get it again.") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} does not hold a state dict (names and tensors).")
    return content


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
    hint = f" Name one of its checkpoints: {few(checkpoints)}." if checkpoints else ""
    raise UserError(f"{found} holds no weights: no *.index.json and no {' / '.join(WEIGHT_SUFFIXES)} file.{hint}")


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
        content = json.loads(index.read_text(encoding="utf-8"))
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
        raise UserError(f"{index} names tensors that no shard has: {few(lost)}.")
    recorded = content.get("metadata") or {}
    weights.metadata.update((key, str(value)) for key, value in recorded.items() if not isinstance(value, dict | list))
    return weights


def load_state_dict(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, cache_dir: str | None = None
) -> dict[str, Tensor]:
    """State dict at ``path`` (see `open_weights`), on ``device``, floating-point tensors in ``dtype`` if given."""
    return dict(open_weights(path, cache_dir).tensors(device, dtype))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a long list, for a message."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


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
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
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
    }
    hints = explain(weights.shapes) if explain and any(problems.values()) else []
    hints += [
        f"The file records {key}={weights.metadata[key]}, the config says {value}: "
        f"set model.{key}={weights.metadata[key]}, or convert the file."
        for key, value in (metadata or {}).items()
        if weights.metadata.get(key, value) != value and not any(f".{key}=" in hint for hint in hints)
    ]
    hints += [f"Tensors {kind}: {few(names)}." for kind, names in problems.items() if names]
    if hints:
        raise UserError("\n  ".join([f"The weights {weights.path} do not fit the configured model.", *hints]))
    return tolerated


def load_model(
    build: Callable[[], Model],
    from_pretrained: str | Path | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    explain: Explain | None = None,
    metadata: Mapping[str, str] | None = None,
    allow_missing: Mapping[str, float] | None = None,
    allow_unexpected: Sequence[str] = (),
    cache_dir: str | None = None,
) -> Model:
    """Build a model and fill it with the weights at ``from_pretrained``; nothing is initialised only to be overwritten.

    Args:
        build: makes the model; called with the meta device as default. A module that has buffers which are not in its
            state dict must offer ``reset_buffers(device)`` to compute them; other tensors it keeps must not be made in
            its constructor.
        from_pretrained: weights, see `open_weights`; empty for a new model, freshly initialised.
        device: where the weights go; "meta", with a new model, builds it without memory.
        dtype: dtype of floating-point weights; None keeps the file's.
        explain: given the shapes in the file, says which config keys disagree (one sentence each).
        metadata: layouts the model expects, checked against those that the file records (if it does).
        allow_missing: prefixes of keys that the file may lack, and the constant they are filled with.
        allow_unexpected: prefixes of keys that the file may have beyond the model's.
        cache_dir: cache of downloads.

    Raises:
        UserError: no such file, an unreadable one, or one that does not fit; says what to do.
    """
    if not from_pretrained:
        with torch.device(device):
            return build().to(dtype=dtype)
    weights = open_weights(from_pretrained, cache_dir)
    with torch.device("meta"):
        model = build()
    missing, unexpected = check_match(
        model,
        weights,
        explain=explain,
        metadata=metadata,
        allow_missing=allow_missing or (),
        allow_unexpected=allow_unexpected,
    )
    state = dict(weights.tensors(device, dtype, skip=unexpected))
    for key in missing:
        value = next(value for prefix, value in (allow_missing or {}).items() if key.startswith(prefix))
        state[key] = torch.full(model.get_parameter(key).shape, value, dtype=dtype, device=device)
        logger.info("%s is not in %s: filled with %g", key, weights.path, value)
    if unexpected:
        logger.info("Left out from %s: %s", weights.path, few(unexpected))
    model.load_state_dict(state, assign=True)
    for name, module in model.named_modules():
        own_buffers = dict(module.named_buffers(recurse=False))
        if any(buffer.is_meta for buffer in own_buffers.values()):
            reset = getattr(module, "reset_buffers", None)
            assert callable(reset), f"{name} has buffers outside its state dict and no reset_buffers(device)"
            reset(torch.device(device))
    return model


def load_into(
    model: nn.Module,
    path: str | Path,
    *,
    explain: Explain | None = None,
    metadata: Mapping[str, str] | None = None,
    cache_dir: str | None = None,
) -> None:
    """Copy the weights at ``path`` into a model that exists, strictly; its devices and dtypes stay.

    Arguments and errors as in `load_model`.
    """
    weights = open_weights(path, cache_dir)
    check_match(model, weights, explain=explain, metadata=metadata)
    own = model.state_dict()
    with torch.no_grad():
        for key, tensor in weights.tensors():
            own[key].copy_(tensor)


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as one safetensors file, beside its place first and then renamed: never half a file.

    Args:
        state_dict: tensors on any device; shared storages are written once per name.
        path: the file; its folder is made.
        metadata: text to record, such as the layouts that `load_model` checks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state_dict.items():
        value = value.detach().contiguous()
        if value.untyped_storage().data_ptr() in seen:  # the format has no shared tensors
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    try:
        beside.touch()
        mode = beside.stat().st_mode  # what the user's umask gives; the library would make the file private
        save_file(tensors, beside, metadata={"format": "pt", **(metadata or {})})
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
