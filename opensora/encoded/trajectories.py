"""Trajectories of a teacher that were computed beforehand, as files, and the dataset that trains on them.

A folder that ``scripts/diffusion/trajectories.py`` writes::

    trajectories.json                 what they were made with (see TrajectoryInfo)
    trajectories/00000.safetensors    per trajectory "<n>.states" [S + 1, C, t, h, w] from noise to data (fp16),
                                      "<n>.condition" [1 + C, t, h, w] mask and references (fp16; not of models that
                                      take none), and its text: "<n>.t5" [L, D], "<n>.clip" [D]
    text.safetensors                  "t5", "clip" of the empty text
    index.parquet                     a row per trajectory: text, cond_type, seed; written last

The rounding of fp16, 5e-4 of a value, is far below what a student gets wrong.
"""

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.config.keys import given_config
from opensora.datasets.source import ClipDataset, SampleKey, Sizes
from opensora.datasets.video_io import BrokenMediaError
from opensora.encoded.config import TrajectoriesConfig
from opensora.encoded.description import read_description
from opensora.registry import DATASETS
from opensora.utils.errors import UserError, first_line

VERSION = 1
OPEN_FILES = 64  # shards that each loader worker keeps open: the sampler goes through all of them at random
DESCRIPTION, INDEX, TEXT, SHARDS = "trajectories.json", "index.parquet", "text.safetensors", "trajectories"


@dataclass(frozen=True)
class TrajectoryInfo:
    """What trajectories were made with: ``trajectories.json``.

    Attributes:
        models: teacher, autoencoder and text encoders, with their weights.
        sampling: ``sampling_option`` of the teacher.
        positions: of the kept states, falling from 1 to 0: times before the shift, equally far apart in steps.
        size: frames, height and width of the videos in pixels.
        plan: hash of the texts, conditions and seeds.
        count: trajectories.
        shard_size: trajectories per file.
        config: command that resumes writing them.
    """

    models: dict[str, Any]
    sampling: dict[str, Any]
    positions: list[float]
    size: list[int]
    plan: str
    count: int
    shard_size: int
    config: str = ""
    version: int = field(default=VERSION)

    def to_json(self) -> str:
        """The text of ``trajectories.json``."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def read(folder: Path) -> "TrajectoryInfo":
        """The info of a folder.

        Raises:
            UserError: no trajectories there, or of another version.
        """
        file = folder / DESCRIPTION
        return read_description(TrajectoryInfo, VERSION, file, "trajectories", "scripts/diffusion/trajectories.py")


def trajectory_shard(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / SHARDS / f"{number:05d}.safetensors"


class TrajectoryDataset(ClipDataset):
    """Trajectories in place of clips: no pixels, nothing that an encoder would have to make.

    Args:
        config: where they are.

    Raises:
        UserError: none there, or not all of them yet.
    """

    def __init__(self, config: TrajectoriesConfig) -> None:
        if not config.data_path:
            raise UserError("dataset.data_path is not set: give a folder that scripts/diffusion/trajectories.py wrote")
        self.folder, self.data_path = Path(config.data_path), config.data_path
        self.info = TrajectoryInfo.read(self.folder)
        index = self.folder / INDEX
        if not index.is_file():
            raise UserError(f"the trajectories in {self.folder} are not finished; resume with: {self.info.config}")
        try:
            table = pd.read_parquet(index)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{index}: cannot be read ({first_line(error)})") from error
        frames, height, width = self.info.size
        self.data = table.assign(num_frames=frames, height=height, width=width, fps=np.nan)
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Workers open files of their own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def fixed_sizes(self) -> Sizes:
        """The one size that they have."""
        frames, height, width = (self.data[name].to_numpy() for name in ("num_frames", "height", "width"))
        return frames, height, width

    def clip(self, key: SampleKey, row: dict[str, Any]) -> Tensor:
        """There is none."""
        raise BrokenMediaError("trajectories hold no pixels")

    def load(self, key: SampleKey) -> dict[str, Any]:
        """``{"index", "size", "text", "path", "states", "condition", "text_t5", "text_clip"}``; see the module."""
        row = self.row(key.row)
        sample = {"index": key.row, "size": key[1:4], "text": str(row["text"]), "path": f"trajectory {key.row}"}
        names = {"states": "states", "condition": "condition", "text_t5": "t5", "text_clip": "clip"}
        shard = trajectory_shard(self.folder, key.row // self.info.shard_size)
        return {**sample, **self._read(shard, {name: f"{key.row}.{stored}" for name, stored in names.items()})}

    def empty_text(self) -> dict[str, Tensor]:
        """``text_t5 [L, D]`` and ``text_clip [D]`` of the empty text."""
        return self._read(self.folder / TEXT, {"text_t5": "t5", "text_clip": "clip"})

    def _read(self, path: Path, names: dict[str, str]) -> dict[str, Tensor]:
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
            self._open.move_to_end(path)
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            found = set(self._open[path].keys())
            return {key: self._open[path].get_tensor(name) for key, name in names.items() if name in found}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: damaged or missing ({error}); delete it and {self.folder / INDEX}, and resume with: "
                f"{self.info.config}"
            ) from error


@DATASETS.register_module("trajectories")
def trajectories(config: TrajectoriesConfig | str | None = None, **keys: Any) -> TrajectoryDataset:
    """:class:`TrajectoryDataset`."""
    return TrajectoryDataset(given_config(TrajectoriesConfig, config, keys, "dataset"))


def stored_state(state: Tensor) -> Tensor:
    """A state as it is kept: fp16, on the CPU."""
    return state.to("cpu", torch.float16)
