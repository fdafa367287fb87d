"""Latents and text embeddings that were computed beforehand, and the dataset that reads them.

A cache is a folder that ``scripts/diffusion/cache.py`` writes::

    cache.json                 what the cache was made with (see CacheInfo)
    index.parquet              a row per cached clip: its row in the table, size, shard, text; written last
    video/00000.safetensors    "<row>.all" [2C, t, h, w], and one tensor per run of frames that conditions give
    text/00000.safetensors     "<number>.t5" [L, D] and "<number>.clip" [D]; number 0 is the empty text

Latents are stored as the moments of their posterior (mean and log-variance), so that training still samples them.
"""

import hashlib
import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.datasets.dataset import SampleKey, VideoTextDataset
from opensora.datasets.table import row_name, row_number
from opensora.datasets.video_io import BrokenMediaError
from opensora.registry import DATASETS
from opensora.utils.errors import UserError

VERSION = 1
WHOLE = "all"  # run of frames that is the whole clip
OPEN_FILES = 8  # shards that each loader worker keeps open
SIZE_COLUMN = "file_bytes"  # not in the index of older caches
INDEX_COLUMNS = ("row", "num_frames", "height", "width", "video_shard", "text", "text_shard", "text_hash", "path_hash")


def run_name(at: str, pixel_frames: int) -> str:
    """Name of a run of frames that a condition gives: ``head_1``, ``tail_1``, ``head_33``, ..."""
    return f"{at}_{pixel_frames}"


def batch_key(run: str) -> str:
    """Where a batch holds the moments of a run, ``[B, 2C, t, h, w]`` (or latents, without a posterior)."""
    return f"video_moments_{run}"


def text_hash(text: str) -> int:
    """A signed 64-bit number that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


@dataclass(frozen=True)
class CacheInfo:
    """What a cache was made with: ``cache.json``.

    Attributes:
        video: autoencoder, its weights, precision and the rules that choose frames; None where there are no latents.
        text: text encoders, their weights and precision; None where there are no embeddings.
        runs: names of the stored runs of frames, see :func:`run_name`.
        plan: hash of the rows, sizes and texts that the cache is to hold.
        clips: how many those are.
        shard_size: clips, or texts, per file.
        config: command that writes the cache anew.
    """

    video: dict[str, Any] | None
    text: dict[str, Any] | None
    runs: list[str] = field(default_factory=list)
    plan: str = ""
    clips: int = 0
    shard_size: int = 64
    config: str = ""
    version: int = VERSION

    def to_json(self) -> str:
        """The text of ``cache.json``."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def read(folder: Path) -> "CacheInfo":
        """The info of a cache.

        Raises:
            UserError: no cache there, or one of another version.
        """
        file = folder / "cache.json"
        if not file.is_file():
            raise UserError(f"{folder} holds no cache (no cache.json); scripts/diffusion/cache.py CONFIG writes one")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.get("version") != VERSION:
                raise UserError(f"{folder}: cache of version {content.get('version')}, this program reads {VERSION}")
            return CacheInfo(**content)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}: cannot be read ({error})") from error


class Cache:
    """Reader of a finished cache.

    Args:
        folder: see the module.
        num_rows: rows of the table it belongs to.

    Raises:
        UserError: no cache, an unfinished one, or one of another table.
    """

    def __init__(self, folder: str | Path, num_rows: int) -> None:
        self.folder = Path(folder)
        self.info = CacheInfo.read(self.folder)
        if not (self.folder / "index.parquet").is_file():
            raise UserError(f"the cache {self.folder} is not finished; go on with: {self.info.config}")
        try:
            there = pq.read_schema(self.folder / "index.parquet").names
            names = [*INDEX_COLUMNS, *([SIZE_COLUMN] if SIZE_COLUMN in there else [])]
            table = pd.read_parquet(self.folder / "index.parquet", columns=names)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{self.folder / 'index.parquet'}: cannot be read ({error})") from error
        rows = table["row"].to_numpy()
        if len(rows) and rows.max() >= num_rows:
            raise UserError(
                f"the cache {self.folder} knows row {row_number(rows.max())}, the table ends at row {num_rows + 1}: "
                f"it was made of another table; write it again: {self.info.config} --overwrite"
            )
        self.rows = rows
        self._columns: dict[str, np.ndarray] = {}
        for name in (*INDEX_COLUMNS[1:], SIZE_COLUMN):
            values = table[name].to_numpy() if name in names else 0
            column = np.zeros(num_rows, dtype=np.int64 if name.endswith(("hash", "bytes")) else np.int32)
            column[rows] = values
            self._columns[name] = column
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Workers open files of their own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def column(self, name: str) -> np.ndarray:
        """A column of the index by row of the table; 0 where a row is not cached, or the cache does not say."""
        return self._columns[name]

    def clip(self, row: int) -> dict[str, Tensor]:
        """Moments of a row by batch key, see :func:`batch_key`."""
        names = {batch_key(run): f"{row}.{run}" for run in self.info.runs}
        return self._read("video", int(self._columns["video_shard"][row]), names)

    def text(self, row: int) -> dict[str, Tensor]:
        """``text_t5 [L, D]`` and ``text_clip [D]`` of a row's caption."""
        number, shard = (int(self._columns[name][row]) for name in ("text", "text_shard"))
        return self._read("text", shard, {"text_t5": f"{number}.t5", "text_clip": f"{number}.clip"})

    def empty_text(self) -> dict[str, Tensor]:
        """The same of the empty text."""
        return self._read("text", 0, {"text_t5": "0.t5", "text_clip": "0.clip"})

    def _read(self, kind: str, shard: int, names: dict[str, str]) -> dict[str, Tensor]:
        path = shard_path(self.folder, kind, shard)
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
            self._open.move_to_end(path)
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            found = self._open[path].keys()
            return {key: self._open[path].get_tensor(name) for key, name in names.items() if name in found}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: damaged or missing ({error}); delete it and go on with: {self.info.config}"
            ) from error


def file_bytes(path: str | Path) -> int:
    """Size of a file; 0 if it is not there, as clips need not be once they are cached."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """File of a shard; ``kind`` is ``video`` or ``text``."""
    return folder / kind / f"{number:05d}.safetensors"


@DATASETS.register_module("cached_video_text")
class CachedVideoTextDataset(VideoTextDataset):
    """Clips with captions whose latents, text embeddings or both were computed beforehand.

    They come from a cache (``cache_dir``), or, without one, from single files named in the columns ``latents_path``
    (latents ``[C, t, h, w]``, ready for the model), ``text_t5_path`` and ``text_clip_path``; each holds one tensor
    (``.pt`` or ``.safetensors``).

    Args:
        cached_video, cached_text: what is taken from the cache.
        cache_dir: folder of the cache.
        return_latents_path: samples name their latent file.
        load_original_video: read the clip too; None does where its latents are not cached.

    The other arguments are those of ``video_text``.

    Raises:
        UserError: as for ``video_text``; no cache, an unfinished one, or one of other paths or captions.
    """

    def __init__(
        self,
        data_path: str | None = None,
        transform_name: str | None = "resize_crop",
        fps_max: float = 16,
        vmaf: bool = False,
        memory_efficient: bool = False,
        max_broken: float = 0.05,
        keep_in_memory: bool = False,
        require_text: bool = True,
        cached_video: bool = False,
        cached_text: bool = False,
        cache_dir: str | None = None,
        return_latents_path: bool = False,
        load_original_video: bool | None = None,
    ) -> None:
        super().__init__(
            data_path, transform_name, fps_max, vmaf, memory_efficient, max_broken, keep_in_memory, require_text
        )
        self.cached_video, self.cached_text = cached_video, cached_text
        self.return_latents_path = return_latents_path
        self.load_original_video = not cached_video if load_original_video is None else load_original_video
        self.cache = Cache(cache_dir, len(self)) if cache_dir and (cached_video or cached_text) else None
        self._check_parts()
        if self.cache is not None and not memory_efficient:
            self._check_rows()

    def _check_parts(self) -> None:
        for kind, wanted, columns in (
            ("video", self.cached_video, ("latents_path",)),
            ("text", self.cached_text, ("text_t5_path", "text_clip_path")),
        ):
            if not wanted:
                continue
            if self.cache is not None and getattr(self.cache.info, kind) is None:
                raise UserError(f"cached_{kind}: the cache {self.cache.folder} holds no {kind}")
            missing = [column for column in columns if column not in self.rows.columns]
            if self.cache is None and missing:
                raise UserError(
                    f"cached_{kind}: set cache_dir to a folder written by scripts/diffusion/cache.py, or add the "
                    f"column {', '.join(missing)} to {self.data_path}"
                )

    def _check_rows(self) -> None:
        """Check every cached row of a table in memory."""
        assert self.cache is not None
        cached = np.zeros(len(self), dtype=bool)
        cached[self.cache.rows] = True
        names = [str(name) for name in self.data.columns]
        for index, values in enumerate(self.data.itertuples(index=False, name=None)):
            if cached[index]:
                self._check_row(index, dict(zip(names, values)))

    def _check_row(self, index: int, row: dict[str, Any]) -> None:
        """Refuse a row whose clip or caption is not the one that was cached."""
        assert self.cache is not None
        if self.cache.column("path_hash")[index] != text_hash(Path(str(row["path"])).name):
            what = f"its clip is {row['path']}"
        elif self.cached_video and self._another_size(index, row):
            what = f"its clip {row['path']} has another size"
        elif self.cached_text and self.cache.column("text_hash")[index] != text_hash(self._cached_caption(index, row)):
            what = f"its text is {self._cached_caption(index, row)!r}"
        else:
            return
        raise UserError(
            f"{row_name(self.data_path, index)}: {what}, not what the cache {self.cache.folder} holds; write it again: "
            f"{self.cache.info.config} --overwrite"
        )

    def _another_size(self, index: int, row: dict[str, Any]) -> bool:
        """Whether a clip of the right name is another one: folders of clips often share their names."""
        assert self.cache is not None
        cached = int(self.cache.column(SIZE_COLUMN)[index])
        return cached > 0 and file_bytes(row["path"]) not in (0, cached)

    def _cached_caption(self, index: int, row: dict[str, Any]) -> str:
        frames = int(self.cache.column("num_frames")[index]) if self.cache is not None else 1
        return self.caption(SampleKey(index, frames, 0, 0, 0), row)

    def fixed_sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Rows are trained at the size of their cached latents; those that are not cached are left out."""
        if self.cache is None or not self.cached_video:
            return None
        frames, height, width = (self.cache.column(name) for name in ("num_frames", "height", "width"))
        return frames, height, width

    def load(self, key: SampleKey) -> dict[str, Any]:
        """``{"index", "size", "text", "path"}`` and, as configured: the moments of :func:`batch_key` (from single files
        ``video_latents``), ``text_t5``, ``text_clip``, ``video``, ``latents_path``."""
        row = self.row(key.row)
        sample = {"index": key.row, "size": key[1:4], "text": self.caption(key, row), "path": row["path"]}
        if self.cache is not None:
            self._check_row(key.row, row)
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
