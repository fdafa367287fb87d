"""What bucket sampling, loading, caching and evaluation ask of a dataset of captioned clips."""

import inspect
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from opensora.config.keys import group_options
from opensora.config.options import DatasetOptions
from opensora.datasets.video_io import BrokenMediaError
from opensora.registry import DATASETS, build_module
from opensora.utils.errors import UserError

Sizes = tuple[np.ndarray, np.ndarray, np.ndarray]


class SampleKey(NamedTuple):
    """What the sampler asks of the dataset: a row at a size, and the seed of the epoch's random choices.

    The seed travels with the key, so a sample is the same whichever worker loads it and however often training was
    resumed. So do the rows of the same bucket that take its place, in turn, if it turns out to be broken. ``read`` is
    false where the pixels are not needed, because what an encoder makes of them is at hand.
    """

    row: int
    num_frames: int
    height: int
    width: int
    seed: int
    spares: tuple[int, ...] = ()
    read: bool = True


class ClipSource(Protocol):
    """A dataset of captioned clips. A class of the user's own best extends :class:`ClipDataset`.

    Attributes:
        data: a row per clip, in a fixed order: columns ``num_frames, height, width``, and all else that is in memory.
        data_path: how messages name the dataset.
        max_broken: share of the rows that may be unreadable before loading stops (one row at least, unless it is 0).
    """

    data: pd.DataFrame
    data_path: str
    max_broken: float

    def __len__(self) -> int:
        """Rows."""

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """A sample, see :meth:`ClipDataset.__getitem__`."""

    def strides(self) -> np.ndarray:
        """Distance between the frames taken of each row: int32 ``[N]``."""

    def fixed_sizes(self) -> Sizes | None:
        """Frames, height and width that each row must be trained at, where the dataset leaves no choice."""

    def row(self, index: int) -> dict[str, Any]:
        """Values of a row by column; ``path`` names its clip, by a file or otherwise."""

    def clip(self, key: SampleKey, row: dict[str, Any]) -> torch.Tensor:
        """Pixels ``[3, T, H, W]`` in [-1, 1] at the size of the key; BrokenMediaError if they cannot be read."""

    def caption(self, key: SampleKey, row: dict[str, Any]) -> str:
        """Text as the encoders get it."""


MEMBERS = ("data", "data_path", "max_broken", "strides", "fixed_sizes", "row", "clip", "caption")


class ClipDataset(Dataset):
    """A :class:`ClipSource` of a table in memory; a subclass sets ``data`` and ``data_path`` and makes the clips."""

    data: pd.DataFrame
    data_path: str
    max_broken: float = 0.05

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """One row at the size in the key.

        Returns:
            ``{"index", "size" (T, H, W), "text", "path", "video" [3, T, H, W] in [-1, 1], "broken"}``; no ``video`` if
            the key says that it is not to be read. ``broken`` lists (row, reason) of the rows that could not be read
            and whose place this one took. If the spares are broken, too, there is nothing but ``index`` and ``broken``.

        Raises:
            BrokenMediaError: the row cannot be read and the key names no spares.
        """
        broken: list[tuple[int, str]] = []
        for row in (key.row, *key.spares):
            try:
                wanted = key._replace(row=row, read=key.read or row != key.row)
                return {**self.load(wanted), "broken": broken}
            except BrokenMediaError as error:
                if not key.spares:
                    raise
                broken.append((row, str(error)))
        return {"index": key.row, "broken": broken}

    def load(self, key: SampleKey) -> dict[str, Any]:
        """The row of the key, without regard to its spares; see :meth:`__getitem__`."""
        row = self.row(key.row)
        sample = {"index": key.row, "size": key[1:4], "text": self.caption(key, row), "path": row["path"]}
        return {**sample, "video": self.clip(key, row)} if key.read else sample

    def strides(self) -> np.ndarray:
        """See :class:`ClipSource`; here every frame is taken."""
        return np.ones(len(self), dtype=np.int32)

    def fixed_sizes(self) -> Sizes | None:
        """See :class:`ClipSource`; here the buckets choose."""
        return None

    def row(self, index: int) -> dict[str, Any]:
        """See :class:`ClipSource`."""
        return {str(name): self.data[name].iloc[index] for name in self.data.columns}

    def clip(self, key: SampleKey, row: dict[str, Any]) -> torch.Tensor:
        """See :class:`ClipSource`."""
        raise NotImplementedError

    def caption(self, key: SampleKey, row: dict[str, Any]) -> str:
        """See :class:`ClipSource`; here the column ``text``, if there is one."""
        text = row.get("text")
        return "" if pd.isna(text) else str(text)


def build_source(section: DatasetOptions, **preferred: Any) -> ClipSource:
    """The dataset of a config section.

    Args:
        section: its options.
        preferred: further arguments for those types that take them.

    Raises:
        UserError: as :func:`opensora.registry.build_module`; a type that is no :class:`ClipSource`.
    """
    group, factory = DATASETS.config_of(section.type), DATASETS.resolve(section.type)
    taken = {*inspect.signature(factory).parameters, *group_options(group)}
    dataset = build_module(section, DATASETS, **{key: value for key, value in preferred.items() if key in taken})
    missing = [name for name in MEMBERS if not hasattr(dataset, name)]
    if missing:
        raise UserError(f"dataset.type={section.type}: no dataset of clips, it has no {', '.join(missing)}")
    return cast(ClipSource, dataset)
