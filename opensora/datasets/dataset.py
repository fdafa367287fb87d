"""Datasets of captioned clips."""

import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from opensora.datasets.table import MEDIA_COLUMNS, read_table, require_columns, resolve_media_paths
from opensora.datasets.transforms import resize_crop, to_model_range
from opensora.datasets.video_io import read_frames
from opensora.registry import DATASETS
from opensora.utils.video import is_video, read_image


class SampleKey(NamedTuple):
    """What the sampler asks of the dataset: a row at a size, and the seed of its random choices.

    The seed travels with the key, so a sample is the same whichever worker loads it and however often training was
    resumed.
    """

    row: int
    num_frames: int
    height: int
    width: int
    seed: int


def target_fps(fps: float, fps_max: float) -> tuple[float, int]:
    """(frames per second after striding, stride) that bring ``fps`` to at most ``fps_max``; (0, 1) for pictures."""
    if math.isnan(fps):
        return 0.0, 1
    if fps < fps_max:
        return fps, 1
    stride = math.ceil(fps / fps_max)
    return math.floor(fps / stride), stride


def add_suffix(text: str, fps: float, fps_max: float, motion_score: float | None = None) -> str:
    """Caption with the frame rate and motion score the model is told in training, e.g. ``... 24 FPS, 4 motion score.``

    Frame rates are left out for pictures (``fps`` 0) and when ``fps_max`` is 999 or more.
    """
    parts = []
    if fps != 0 and fps_max < 999:
        parts.append(f"{fps:g} FPS")
    if motion_score is not None and not math.isnan(motion_score):
        parts.append(f"{round(motion_score)} motion score")
    if not parts:
        return text
    text = text.strip()
    text = text if not text or re.search(r"[.!?]$", text) else text + "."
    return f"{text} {', '.join(parts)}.".strip()


def choose_frames(total: int, num_frames: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """Frame numbers of a random window of ``num_frames`` frames, ``stride`` apart, in a clip of ``total`` frames."""
    window = num_frames * stride
    start = int(rng.integers(0, max(total - window, 0) + 1))
    end = min(start + window, total)
    return np.linspace(start, end - 1, num_frames).astype(int)


@DATASETS.register_module("video_text")
class VideoTextDataset(Dataset):
    """Clips and pictures with captions, listed in a CSV or parquet table.

    Args:
        data_path: table with columns ``path,text,num_frames,height,width,fps`` (and ``score_vmafmotion`` if ``vmaf``).
        transform_name: "resize_crop".
        fps_max: clips of a higher rate are strided down to it.
        vmaf: append the motion score to the caption.
        memory_efficient: accepted for existing configs; the table stays in memory.
        keep_in_memory: keep decoded clips (uint8) in memory; for small datasets that are read many times.
        require_text: refuse a table without captions (VAE training does not need them).

    Raises:
        UserError: missing file or column, or clips that are not where the table says.
    """

    def __init__(
        self,
        data_path: str,
        transform_name: str = "resize_crop",
        fps_max: float = 16,
        vmaf: bool = False,
        memory_efficient: bool = False,
        keep_in_memory: bool = False,
        require_text: bool = True,
    ) -> None:
        del memory_efficient
        if transform_name != "resize_crop":
            raise ValueError(f"dataset.transform_name={transform_name!r}: only 'resize_crop' is available")
        columns = [*MEDIA_COLUMNS, *(["text"] if require_text else [])]
        table = read_table(data_path)
        require_columns(table, columns, data_path, hint="scripts/cnv/meta.py adds all but path and text.")
        if vmaf and "score_vmafmotion" not in table:
            vmaf = False
        self.data = resolve_media_paths(table, data_path)
        self.data_path = str(data_path)
        self.fps_max = fps_max
        self.vmaf = vmaf
        self._decoded: dict[int, np.ndarray] | None = {} if keep_in_memory else None

    def __len__(self) -> int:
        return len(self.data)

    def stride(self, index: int) -> int:
        """Distance between the frames taken from row ``index``."""
        return target_fps(float(self.data["fps"].iloc[index]), self.fps_max)[1]

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """``{"index", "video" [3, T, H, W] in [-1, 1], "text", "path"}`` of one row at the size in the key."""
        row = self.data.iloc[key.row]
        fps, stride = target_fps(float(row["fps"]), self.fps_max)
        rng = np.random.default_rng(key.seed)
        video = resize_crop(to_model_range(self._frames(key, row, stride, rng)), key.height, key.width)
        motion = float(row["score_vmafmotion"]) if self.vmaf else None
        text = str(row["text"]) if "text" in row else ""
        text = add_suffix(text, fps if key.num_frames > 1 else 0, self.fps_max, motion)
        return {"index": key.row, "video": video, "text": text, "path": row["path"]}

    def _frames(self, key: SampleKey, row: Any, stride: int, rng: np.random.Generator) -> np.ndarray:
        if not is_video(row["path"]):
            return read_image(row["path"])[None]
        indices = choose_frames(int(row["num_frames"]), key.num_frames, stride, rng)
        if self._decoded is None:
            return read_frames(row["path"], indices.tolist(), float(row["fps"]))
        if key.row not in self._decoded:
            everything = list(range(int(row["num_frames"])))
            self._decoded[key.row] = read_frames(row["path"], everything, float(row["fps"]))
        return self._decoded[key.row][indices]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of samples and list everything else."""
    return {
        key: torch.stack([sample[key] for sample in samples]) if torch.is_tensor(value) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }
