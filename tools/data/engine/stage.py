"""What a stage of the pipeline is: rows in, rows out, with a fingerprint of everything that decides its result."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
import polars as pl

from opensora.config.options import Options
from opensora.utils.errors import UserError
from opensora.utils.optional import check_module

Row = dict[str, Any]
Worker = Callable[[Row], list[Row]]

DIGEST_CHARS = 24  # of a sha256 in hex: 96 bits, no collision among any number of clips
SMALLEST_SIDE, LARGEST_SIDE = 16, 16384  # px; below, there is nothing to be seen, and optical flow fails
WEIGHT_SAMPLE = 1 << 20  # bytes hashed at either end of a weight file


def digest(value: Any) -> str:
    """Hash of anything JSON can hold (paths count as text)."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_CHARS]


def digest_weights(path: Path) -> str:
    """Hash of a weight file by size, beginning and end; of a folder by all its files."""
    if path.is_dir():
        return digest([(p.name, digest_weights(p)) for p in sorted(path.iterdir()) if p.is_file()])
    size = path.stat().st_size
    with path.open("rb") as file:
        content = hashlib.sha256(file.read(WEIGHT_SAMPLE))
        file.seek(max(size - WEIGHT_SAMPLE, 0))
        content.update(file.read())
    return f"{size}-{content.hexdigest()[:DIGEST_CHARS]}"


@dataclass(frozen=True, kw_only=True)
class NoOptions(Options):
    """A stage that nothing can be set of."""


class Stage:
    """One step from rows to rows; subclasses say which columns they read and add.

    Args:
        settings: the stage's section of the config. A subclass annotates it with its option group, a dataclass of
            ``opt`` fields; ``neutral=True`` marks those that cannot change a result (how many at a time, how often to
            retry).
        root: output folder of the run. Paths in the table are relative to it. It is no part of the fingerprint, so a
            finished folder may be moved.

    Class attributes:
        name: also its section in the config and its folder below ``stages/``.
        version: raised whenever the same settings give another result.
        adds: columns it writes, with their types.
        expands: whether a row may become several.
        files: columns of ``adds`` that name files below ``root``; where one is gone, the row is done again.
        folders: those below ``root`` that it writes files into.
    """

    settings: Any
    root: Path

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    adds: ClassVar[dict[str, Any]] = {}
    expands: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Any, root: Path) -> None:
        self.settings, self.root = settings, root

    @classmethod
    def options(cls) -> type:
        """The option group: what the class annotates ``settings`` with."""
        hint = get_type_hints(cls)["settings"]
        return NoOptions if hint is Any else hint

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns handed to the worker."""
        return ()

    @property
    def identity(self) -> tuple[str, ...]:
        """Those of ``reads`` that decide the result. Where a file lies does not, its hash does."""
        return self.reads

    @property
    def concurrency(self) -> int:
        """Rows at a time of a stage that waits rather than computes, so that threads of one process do; 0: computes."""
        return 0

    def weights(self) -> Sequence[Path]:
        """Files or folders of weights that the result depends on."""
        return ()

    @property
    def device(self) -> str:
        """Where the stage computes: cpu, cuda, ..."""
        return "cpu"

    def most_workers(self) -> int | None:
        """How many processes may work at once, None for any number: a GPU holds one model."""
        return None if self.device == "cpu" else 1

    def check(self) -> None:
        """Raise a UserError for settings, libraries or weights that cannot work, before anything runs."""

    def description(self) -> dict[str, Any]:
        """Everything that decides the result for a given row."""
        weights = {str(path): digest_weights(path) for path in self.weights()}
        return {
            "stage": self.name,
            "version": self.version,
            "settings": values_of(self.settings, deciding=True),
            "weights": weights,
        }

    def fingerprint(self) -> str:
        """Hash of ``description``, of weights by content alone."""
        description = self.description()
        return digest({**description, "weights": sorted(description["weights"].values())})[:16]

    def key(self, row: Mapping[str, Any]) -> str:
        """Under which a row's result is stored: a hash of the columns that decide it."""
        return digest([row.get(column) for column in self.identity])

    def worker(self) -> Worker:
        """The function that does a row; called once per process, so it is where models are loaded."""
        raise NotImplementedError

    def finish(self, table: pl.DataFrame) -> pl.DataFrame:
        """Last word on the whole table, its new columns joined."""
        return table


def values_of(settings: Options, deciding: bool = False) -> dict[str, Any]:
    """Settings by name, all of them or only those that decide a result."""
    keys = [key for key in fields(settings) if key.metadata]
    return {key.name: getattr(settings, key.name) for key in keys if not (deciding and key.metadata.get("neutral"))}


class TableStage(Stage):
    """A stage that needs all rows at once; it is quick and runs anew every time."""

    def run_table(self, table: pl.DataFrame) -> pl.DataFrame:
        """The rows that are still in, with the columns of ``adds``; order and number unchanged."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClipInfo:
    """What a pixel stage knows before the first frame: size as displayed, rate and (about) how many frames."""

    height: int
    width: int
    fps: float
    num_frames: int


class Analyser:
    """What a pixel stage does to one clip."""

    def add(self, index: int, time: float, frame: "Picture") -> None:
        """Take the next frame: its number, its time in seconds from the clip's start, its pixels."""
        raise NotImplementedError

    def result(self) -> Row:
        """The columns of this clip, after the last frame."""
        raise NotImplementedError


class Picture:
    """One decoded frame in the forms that stages ask for, each made once and shared.

    Args:
        luma: uint8 [H, W].
        rgb: makes uint8 [H, W, 3]; called at most once.
    """

    def __init__(self, luma: np.ndarray, rgb: Callable[[], np.ndarray]) -> None:
        self.luma = luma
        self._rgb = rgb
        self._made: dict[int, np.ndarray] = {}

    @property
    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        if 0 not in self._made:
            self._made[0] = self._rgb()
        return self._made[0]

    def small(self, side: int) -> np.ndarray:
        """Luma shrunk to a long side of at most ``side``, uint8."""
        if side not in self._made:
            self._made[side] = shrink(self.luma, side)
        return self._made[side]


def check_library(module: str, wanted_by: str) -> None:
    """Raise a UserError that says how to install a library that only some stages need."""
    check_module(module, wanted_by, "`pip install --no-deps -r requirements-data.txt`")


def check_order(low_key: str, low: float, high_key: str, high: float) -> None:
    """Raise a UserError for a lower limit above its upper one."""
    if low > high:
        raise UserError(f"--{low_key} {low:g} is above --{high_key} {high:g}: nothing would be left")


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W] or [H, W, 3] with its long side at most ``side``, area-averaged; never enlarged."""
    import cv2

    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(image)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


class PixelStage(Stage):
    """A stage that looks at the frames of a clip; neighbouring ones share one decoding."""

    reads = ("clip_id", "clip_path")
    identity = ("clip_id",)

    def analyser(self, row: Row, info: ClipInfo) -> Analyser:
        """What to do with the frames of this row."""
        raise NotImplementedError
