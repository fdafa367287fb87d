"""Latents and text embeddings that were computed beforehand, as files.

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.datasets.table import row_number
from opensora.encoded.description import read_description
from opensora.utils.errors import UserError, first_line

VERSION = 1
WHOLE = "all"  # name of the run of frames that is the whole clip
OPEN_FILES = 256  # shards that each loader worker keeps open: opening one takes longer than reading from it
ASKED_AT_A_TIME = 16  # files
SIZE_COLUMN = "file_bytes"  # not in the index of older caches
INDEX_COLUMNS = ("row", "num_frames", "height", "width", "video_shard", "text", "text_shard", "text_hash", "path_hash")


def batch_key(run: str) -> str:
    """Where a batch holds the moments of the run of frames of that name, ``[B, 2C, t, h, w]`` (or latents, without a
    posterior)."""
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
        runs: names of what is stored of clips: :data:`WHOLE`, and see :class:`opensora.datasets.runs.ClipPart`.
        plan: hash of the rows, sizes and texts that the cache is to hold.
        clips: how many those are.
        shard_size: clips, or texts, per file.
        config: command that rewrites the cache.
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
        return read_description(CacheInfo, VERSION, folder / "cache.json", "cache", "scripts/diffusion/cache.py")


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
            raise UserError(f"the cache {self.folder} is not finished; resume with: {self.info.config}")
        try:
            there = pq.read_schema(self.folder / "index.parquet").names
            names = [*INDEX_COLUMNS, *([SIZE_COLUMN] if SIZE_COLUMN in there else [])]
            table = pd.read_parquet(self.folder / "index.parquet", columns=names)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{self.folder / 'index.parquet'}: cannot be read ({first_line(error)})") from error
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
                opened = safe_open(path, "pt")
                self._open[path] = opened, frozenset(opened.keys())
            self._open.move_to_end(path)
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            opened, found = self._open[path]
            return {key: opened.get_tensor(name) for key, name in names.items() if name in found}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: damaged or missing ({error}); delete it and resume with: {self.info.config}"
            ) from error


def file_bytes(paths: Sequence[str]) -> np.ndarray:
    """Sizes of files, int64; 0 where one is not there, as clips need not be once they are cached.

    Disks of a network answer slowly, one by one, but many questions at a time.
    """
    sizes = np.zeros(len(paths), dtype=np.int64)

    def ask(first: int) -> None:
        for place in range(first, len(paths), ASKED_AT_A_TIME):
            with suppress(OSError, ValueError):  # what stands for a clip need not be a path
                sizes[place] = Path(paths[place]).stat().st_size

    with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
        list(pool.map(ask, range(ASKED_AT_A_TIME)))
    return sizes


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """File of a shard; ``kind`` is ``video`` or ``text``."""
    return folder / kind / f"{number:05d}.safetensors"
