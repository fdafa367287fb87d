"""The dataset that reads latents and text embeddings computed beforehand, whatever the clips come from."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from opensora.config.keys import given_config
from opensora.datasets.config import VideoTextConfig
from opensora.datasets.dataset import VideoTextDataset
from opensora.datasets.sharing import shared_flags
from opensora.datasets.source import ClipDataset, ClipSource, SampleKey, Sizes
from opensora.datasets.table import row_name
from opensora.datasets.video_io import BrokenMediaError
from opensora.encoded.config import CachedVideoTextConfig
from opensora.encoded.store import SIZE_COLUMN, Cache, file_bytes, shard_path, text_hash
from opensora.registry import DATASETS
from opensora.utils.errors import UserError

CHECKED_AT_A_TIME = 4096  # rows, whose values are then in memory


class CachedVideoTextDataset(ClipDataset):
    """Clips with captions whose latents, text embeddings or both were computed beforehand.

    They come from a cache (``cache_dir``), or, without one, from single files named in the columns ``latents_path``
    (latents ``[C, t, h, w]``, ready for the model), ``text_t5_path`` and ``text_clip_path``; each holds one tensor
    (``.pt`` or ``.safetensors``).

    A row whose clip or caption is not the one that was cached is refused: when the dataset is built if paths are in
    memory, else when the row is first read.

    Args:
        source: the clips and captions themselves.
        config: the cache, what is taken from it and what beside it.

    Raises:
        UserError: no cache, an unfinished one, or one of other paths or captions.
    """

    def __init__(self, source: ClipSource, config: CachedVideoTextConfig) -> None:
        self.source = source
        self.data, self.data_path, self.max_broken = source.data, source.data_path, source.max_broken
        self.cached_video, self.cached_text = config.cached_video, config.cached_text
        self.return_latents_path = config.return_latents_path
        original = config.load_original_video
        self.load_original_video = not config.cached_video if original is None else original
        wanted = config.cached_video or config.cached_text
        self.cache = Cache(config.cache_dir, len(self)) if config.cache_dir and wanted else None
        self._check_parts()
        if self.cache is not None:
            # Of all loader workers together, so that a row is checked once in a run.
            self._checked = shared_flags(len(self))
            if "path" in self.data.columns:
                rows = np.sort(self.cache.rows)
                for part in np.array_split(rows, math.ceil(len(rows) / CHECKED_AT_A_TIME) or 1):
                    self._check_rows(part)

    def __len__(self) -> int:
        return len(self.source)

    def _check_parts(self) -> None:
        for kind, wanted, columns in (
            ("video", self.cached_video, ("latents_path",)),
            ("text", self.cached_text, ("text_t5_path", "text_clip_path")),
        ):
            if wanted and self.cache is not None and getattr(self.cache.info, kind) is None:
                raise UserError(f"cached_{kind}: the cache {self.cache.folder} holds no {kind}")
            if wanted and self.cache is None and len(self):
                there = self.source.row(0)
                missing = [column for column in columns if column not in there]
                if missing:
                    raise UserError(
                        f"cached_{kind}: set cache_dir to a folder written by scripts/diffusion/cache.py, or add the "
                        f"column {', '.join(missing)} to {self.data_path}"
                    )

    def _check_rows(self, rows: np.ndarray) -> None:
        """Refuse rows whose clip or caption is not the one that was cached."""
        assert self.cache is not None
        values = [self.source.row(index) for index in rows.tolist()]
        paths = [str(row["path"]) for row in values]
        other = {"path": _hashes([Path(path).name for path in paths]) != self.cache.column("path_hash")[rows]}
        if self.cached_video:
            other["size"] = self._other_sizes(rows, paths)
        captions: list[str] = []
        if self.cached_text:
            captions = [self._cached_caption(index, row) for index, row in zip(rows.tolist(), values)]
            other["text"] = _hashes(captions) != self.cache.column("text_hash")[rows]
        wrong = np.logical_or.reduce(list(other.values()))
        if wrong.any():
            first = int(wrong.argmax())
            kind = next(kind for kind, found in other.items() if found[first])
            raise UserError(
                f"{row_name(self.data_path, rows[first])}: {_difference(kind, paths, captions, first)}, not what the "
                f"cache {self.cache.folder} holds; write it again: {self.cache.info.config} --overwrite"
            )
        self._checked[torch.from_numpy(rows.astype(np.int64))] = True

    def _other_sizes(self, rows: np.ndarray, paths: list[str]) -> np.ndarray:
        """Which clips of the right name are others: folders of clips often share their names."""
        assert self.cache is not None
        cached = self.cache.column(SIZE_COLUMN)[rows]
        if not cached.any():
            return np.zeros(len(rows), dtype=bool)
        found = file_bytes(paths)
        return (cached > 0) & (found > 0) & (found != cached)

    def _cached_caption(self, index: int, row: dict[str, Any]) -> str:
        frames = int(self.cache.column("num_frames")[index]) if self.cache is not None else 1
        return self.caption(SampleKey(index, frames, 0, 0, 0), row)

    def strides(self) -> np.ndarray:
        """Those of the clips."""
        return self.source.strides()

    def fixed_sizes(self) -> Sizes | None:
        """Rows are trained at the size of their cached latents; those that are not cached are left out."""
        if self.cache is None or not self.cached_video:
            return self.source.fixed_sizes()
        frames, height, width = (self.cache.column(name) for name in ("num_frames", "height", "width"))
        return frames, height, width

    def row(self, index: int) -> dict[str, Any]:
        """Those of the clips."""
        return self.source.row(index)

    def clip(self, key: SampleKey, row: dict[str, Any]) -> Tensor:
        """The clip itself, ``[3, T, H, W]``."""
        return self.source.clip(key, row)

    def caption(self, key: SampleKey, row: dict[str, Any]) -> str:
        """That of the clip."""
        return self.source.caption(key, row)

    def load(self, key: SampleKey) -> dict[str, Any]:
        """``{"index", "size", "text", "path"}`` and, as configured: the moments of
        :func:`opensora.encoded.store.batch_key` (from single files ``video_latents``), ``text_t5``, ``text_clip``,
        ``video``, ``latents_path``."""
        row = self.row(key.row)
        sample = {"index": key.row, "size": key[1:4], "text": self.caption(key, row), "path": row["path"]}
        if self.cache is not None and not self._checked[key.row]:
            self._check_rows(np.array([key.row]))
        if self.cached_video:
            sample |= self.cache.clip(key.row) if self.cache else {"video_latents": read_tensor(row["latents_path"])}
        if self.cached_text:
            single = {name: row.get(f"{name}_path") for name in ("text_t5", "text_clip")}
            sample |= self.cache.text(key.row) if self.cache else {n: read_tensor(p) for n, p in single.items()}
        if self.load_original_video and key.read:
            sample["video"] = self.clip(key, row)
        if self.return_latents_path:
            sample["latents_path"] = self._latents_path(key.row, row)
        return sample

    def _latents_path(self, index: int, row: dict[str, Any]) -> str:
        if self.cache is None:
            return str(row.get("latents_path", ""))
        return str(shard_path(self.cache.folder, "video", int(self.cache.column("video_shard")[index])))


@DATASETS.register_module("cached_video_text")
def cached_video_text(
    config: CachedVideoTextConfig | str | None = None, *, require_text: bool = True, **keys: Any
) -> CachedVideoTextDataset:
    """:class:`CachedVideoTextDataset` of the clips of a table; arguments as of ``VideoTextDataset``."""
    own = given_config(CachedVideoTextConfig, config, keys, "dataset")
    return CachedVideoTextDataset(VideoTextDataset(table_of(own), require_text=require_text), own)


def table_of(config: VideoTextConfig) -> VideoTextConfig:
    """The part of a section that is about the table itself."""
    names = [key.name for key in fields(VideoTextConfig) if key.metadata]
    given = tuple(key for key in config.given if key in names)
    return VideoTextConfig(type="video_text", given=given, **{name: getattr(config, name) for name in names})


def _hashes(texts: list[str]) -> np.ndarray:
    return np.array([text_hash(text) for text in texts], dtype=np.int64)


def _difference(kind: str, paths: list[str], captions: list[str], place: int) -> str:
    """What of a row is not what was cached, in words."""
    if kind == "text":
        return f"its text is {captions[place]!r}"
    return f"its clip is {paths[place]}" if kind == "path" else f"its clip {paths[place]} has another size"


def read_tensor(path: Any) -> Tensor:
    """The one tensor of a ``.pt`` or ``.safetensors`` file.

    Raises:
        BrokenMediaError: missing, unreadable, or something else in it; the row is then replaced as a broken clip is.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(str(path), "pt") as file:
                (name,) = file.keys()
                return file.get_tensor(name)
        tensor = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors have a dozen kinds
        raise BrokenMediaError(f"{path}: not a file of one tensor ({type(error).__name__})") from error
    if not isinstance(tensor, Tensor):
        raise BrokenMediaError(f"{path}: not a file of one tensor (holds a {type(tensor).__name__})")
    return tensor
