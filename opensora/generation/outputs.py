"""Where samples go and what is written beside them."""

import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.config.commands import InferenceOptions
from opensora.diffusion.kept_pixels import KeptRegion
from opensora.diffusion.lora import as_list, split_lora
from opensora.diffusion.lora_files import find_lora
from opensora.diffusion.prepared import needed_sections
from opensora.generation import LATENTS_ENDING
from opensora.generation.requests import Request
from opensora.models.quantization.loading import kind_of_section
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.paths import read_text
from opensora.utils.video import VideoWriter, save_image
from opensora.utils.weights import WeightFiles, fingerprint, index_of, open_weights
from opensora.utils.weights_writing import save_safetensors

# Longest file name without ending: file systems take 255 bytes.
MAX_NAME_BYTES = 200
NOTES = (".json", ".txt")  # beside a sample
VERSIONED = ("opensora", "torch", "transformers", "numpy", "av")


def output_folder(cfg: InferenceOptions) -> Path:
    """``<save_dir>/{image|video}_{resolution}``; image for one frame, HxW where no resolution is named."""
    option = cfg.sampling_option
    kind = "image" if option.num_frames == 1 else "video"
    explicit = option.height is not None and option.width is not None
    size = f"{option.height}x{option.width}" if explicit else option.resolution
    return Path(cfg.save_dir) / f"{kind}_{size}"


def file_stem(cfg: InferenceOptions, request: Request, epoch: int) -> str:
    """File name of a sample without its ending.

    Args:
        cfg: resolved config.
        request: the prompt.
        epoch: which of its repetitions, from 0.

    Returns:
        ``<prompt>-<epoch>`` with ``prompt_as_path``; else the name from the table, or the table's own name and the
        row, after ``save_prefix`` and, from the second repetition on, followed by ``_<epoch>``.
    """
    if cfg.prompt_as_path:
        return f"{_safe_name(request.text.strip('.'))}-{epoch}"
    table = "prompt"
    if cfg.prompt is None and cfg.dataset is not None:
        table = Path(cfg.dataset.data_path or cfg.dataset.type).stem
    name = cfg.save_prefix + (request.name or f"{table}_{request.index:04d}")
    return _safe_name(name) + (f"_{epoch}" if epoch else "")


def _safe_name(text: str) -> str:
    """The text as one path component."""
    text = re.sub(r"[/\\\x00-\x1f]", "_", text.strip()) or "_"
    if not text.strip("."):  # names of folders
        text = "_" * len(text)
    raw = text.encode()
    if len(raw) <= MAX_NAME_BYTES:
        return text
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return f"{raw[:MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"


def check_writable(folder: str | Path) -> None:
    """See that files could be made in a folder (which need not exist yet), without making anything.

    Raises:
        UserError: no permission, or a file is in the way.
    """
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"save_dir {folder}: {path} is a file, not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"save_dir {folder}: no permission to write in {path}")


def check_stems(cfg: InferenceOptions, requests: Sequence[Request]) -> None:
    """Raises a UserError if two samples would be written to the same file."""
    seen: dict[str, str] = {}
    for request, epoch in itertools.product(requests, range(cfg.num_sample)):
        stem = file_stem(cfg, request, epoch)
        if seen.get(stem, request.where) != request.where and epoch:
            raise UserError(
                f"{request.where}: its repetition {epoch} would be written to {stem!r}, as {seen[stem]}; rename one"
            )
        if stem in seen:
            column = "the same prompt" if cfg.prompt_as_path else f"the same name {stem!r}"
            raise UserError(f"{request.where}: has {column} as {seen[stem]}; one would overwrite the other")
        seen[stem] = request.where


def has_video(stem: Path) -> bool:
    """Whether the sample itself is there: its video or image."""
    return any(_with_ending(stem, ending).exists() for ending in (".mp4", ".png"))


def is_taken(stem: Path) -> bool:
    """Whether any file of a sample is there: itself, its latents, its notes, or the picture it starts from."""
    beside = (LATENTS_ENDING, *NOTES)
    return has_video(stem) or condition_path(stem).exists() or any(_with_ending(stem, e).exists() for e in beside)


def foreign_note(stem: Path) -> Path | None:
    """A file where a sample's notes belong that this program did not write: one without the sample's record."""
    if has_video(stem) or recorded_prompt(stem) is not None:
        return None
    return next((path for ending in NOTES if (path := _with_ending(stem, ending)).exists()), None)


def recorded_prompt(stem: Path) -> str | None:
    """Prompt in the ``.json`` of a sample, None if that is not there or not ours."""
    try:
        record = json.loads(read_text(_with_ending(stem, ".json")))
    except (OSError, ValueError):
        return None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    return prompt if isinstance(prompt, str) else None


def condition_path(stem: Path) -> Path:
    """The picture made first (``use_t2i2v``), in ``generated_condition`` beside the videos."""
    return stem.parent / "generated_condition" / f"{stem.name}.png"


def _with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)  # names may hold dots, so with_suffix would cut them


class SampleFile:
    """A sample on its way to a file, frames as they come: a ``.mp4``, or a ``.png`` of a single frame.

    Nothing of it is there before :meth:`put_in_place`.

    Args:
        stem: the file without its ending.
        fps: frames per second of a video.
    """

    def __init__(self, stem: Path, fps: float) -> None:
        self.stem, self.fps = stem, fps
        self._first: np.ndarray | None = None  # a frame that may be the only one
        self._video: VideoWriter | None = None

    def write(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3]."""
        if self._video is None and self._first is None and len(frames) == 1:
            self._first = frames
            return
        if self._video is None:
            self._video = VideoWriter(_with_ending(self.stem, ".mp4"), self.fps)
        if self._first is not None:
            self._video.write(self._first)
            self._first = None
        self._video.write(frames)

    def put_in_place(self) -> Path:
        """Finish the file and give it its name; returns that."""
        if self._video is not None:
            return self._video.put_in_place()
        assert self._first is not None, "no frames"
        return save_image(self._first[0], _with_ending(self.stem, ".png"))

    def discard(self) -> None:
        """Leave nothing of it."""
        if self._video is not None:
            self._video.discard()
        self._video = self._first = None


def windows_folder(stem: Path, digest: str) -> Path:
    """Where the latents of a long video are kept while it is made."""
    return stem.with_name(f".{stem.name}.{digest}.windows")


def remove_windows(stem: Path) -> None:
    """Delete what was kept of a long video while it was made, or begun with other settings."""
    for folder in stem.parent.glob(str(windows_folder(Path(glob.escape(stem.name)), "[0-9a-f]" * 16))):
        shutil.rmtree(folder, ignore_errors=True)


def save_latents(
    latents: Tensor,
    stem: Path,
    text: str,
    fps: float,
    frames: slice,
    window: int | None = None,
    kept: KeptRegion | None = None,
) -> Path:
    """Keep the latents [C, T, h, w] of a sample, with what it takes to decode them alone.

    Args:
        latents: of one sample.
        stem: file without ending.
        text: final prompt.
        fps: frames per second of the video.
        frames: which frames of the decoded video to keep.
        window: frames of the windows that it was made in, if it was.
        kept: what it keeps of a region, if it does.
    """
    path = _with_ending(stem, LATENTS_ENDING)
    facts = {"text": text, "fps": f"{fps:g}", "first_frame": str(frames.start), "end_frame": str(frames.stop)}
    facts |= {} if window is None else {"window": str(window)}
    tensors = {"latents": latents.float().cpu()}
    if kept is not None:
        tensors |= {"kept_latents": kept.latents.contiguous(), "kept_cells": kept.cells.contiguous()}
    save_safetensors(tensors, path, facts)
    return path


def save_record(record: Mapping[str, Any], stem: Path) -> Path:
    """Write the ``.json`` that tells how to make the sample again."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    return write_text(text + "\n", _with_ending(stem, ".json"))


def save_text(text: str, stem: Path) -> Path:
    """Write the ``.txt`` with the final prompt."""
    return write_text(text, _with_ending(stem, ".txt"))


def versions() -> dict[str, str]:
    """Versions of what made a sample."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def weight_records(cfg: InferenceOptions) -> dict[str, dict[str, str | float]]:
    """Per model and adapter: its weight path, and a hash of the weights themselves (:meth:`WeightFiles.fingerprint`).

    A model without a path has random weights, drawn from the run's seed; the record says so.
    """
    records: dict[str, dict[str, str | float]] = {}
    for name, section in needed_sections(cfg).items():
        path, kind = section.from_pretrained, kind_of_section(section)
        records[name] = _weight_record(path) if path else {"path": f"random weights of seed {cfg.seed}"}
        if kind is not None:
            records[name] |= {"quantize": kind, "approximate": True}
    for number, entry in enumerate(as_list(cfg.pretrained_lora_path)):
        records[f"lora_{number}"] = lora_record(entry)
    return records


def lora_record(entry: str) -> dict[str, str | float]:
    """Of an adapter given as ``PATH@strength``: its file, and a hash of it."""
    path, strength = split_lora(entry)
    file = find_lora(path)
    return {"path": entry, "file": str(file), "sha256": fingerprint(file), "strength": strength}


def _weight_record(path: str) -> dict[str, str | float]:
    found = _stored(path)
    return {"path": str(path), **({"sha256": found.fingerprint()} if found is not None else {})}


def _stored(path: str) -> WeightFiles | None:
    """The weights that a model was loaded from, None where they are not at hand as files that can be read."""
    folder = Path(path).expanduser()
    try:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if (folder / "config.json").is_file() and files:  # of Hugging Face's, which prefers these to others beside them
            return WeightFiles(folder, files)
        return open_weights(path) if folder.exists() or index_of(folder).is_file() else None
    except UserError:
        return None
