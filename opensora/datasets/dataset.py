"""Datasets of captioned clips."""

import math
import re
from typing import Any

import numpy as np
import torch

from opensora.config.keys import given_config
from opensora.datasets.config import VideoTextConfig
from opensora.datasets.rows import ShardedRows, TableRows, read_numbers, with_numbers
from opensora.datasets.source import ClipDataset, SampleKey
from opensora.datasets.table import MEDIA_COLUMNS, read_table, require_columns, resolve_media_paths, row_number
from opensora.datasets.transforms import TRANSFORMS, as_bytes, fit_frames
from opensora.datasets.video_io import BrokenMediaError, read_frames, read_image
from opensora.registry import DATASETS
from opensora.utils.errors import UserError
from opensora.utils.media.kinds import is_picture

FPS_SLACK = 0.01  # share by which a rate may be above what is asked for: cameras write 24.02 or 30.03


def target_fps(fps: float, fps_max: float) -> tuple[float, int]:
    """(frames per second after striding, stride) that bring ``fps`` to at most ``fps_max``; (0, 1) for pictures.

    A rate that is above ``fps_max``, or a multiple of it, by no more than :data:`FPS_SLACK` counts as that.
    """
    if math.isnan(fps):
        return 0.0, 1
    if fps < fps_max:
        return fps, 1
    stride = math.ceil(fps / fps_max / (1 + FPS_SLACK))
    return min(math.floor(fps / stride), fps_max), stride


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


def frame_strides(fps: np.ndarray, fps_max: float) -> np.ndarray:
    """Strides of :func:`target_fps` for many rates: int32 ``[N]``."""
    strided = np.nan_to_num(np.ceil(fps / fps_max / (1 + FPS_SLACK)), nan=1.0)
    strided = np.minimum(strided, np.iinfo(np.int32).max)
    return np.where(np.isnan(fps) | (fps < fps_max), 1, strided).astype(np.int32)


@DATASETS.register_module("video_text")
class VideoTextDataset(ClipDataset):
    """Clips and pictures with captions, listed in a CSV or parquet table.

    Args:
        config: the table, with columns ``path,text,num_frames,height,width,fps`` (and ``score_vmafmotion`` if
            ``vmaf``), and how it is read. ``transform_name`` is "resize_crop" (cover the size, cut the centre) or
            "center" (the same for square sizes, pictures halved by averaging before they are scaled). With
            ``memory_efficient`` only the numbers of the (parquet) table are in memory, and clips that are missing are
            found when they are read.
        require_text: refuse a table without captions (VAE training does not need them).
        **keys: those of `VideoTextConfig` instead.

    Raises:
        UserError: missing file or column, a length, size or rate that is not a number, or clips that are not where the
            table says.
    """

    def __init__(self, config: VideoTextConfig | str | None = None, *, require_text: bool = True, **keys: Any) -> None:
        own = given_config(VideoTextConfig, config, keys, "dataset")
        data_path, vmaf = own.data_path, own.vmaf
        if not data_path:
            raise UserError("dataset.data_path is not set: give a csv or parquet table of clips")
        self.data_path, self.fps_max, self.max_broken = data_path, own.fps_max, own.max_broken
        self.transform_name = own.transform_name or "resize_crop"
        if self.transform_name not in TRANSFORMS:
            raise UserError(f"dataset.transform_name={self.transform_name!r}: choose from {', '.join(TRANSFORMS)}")
        texts = ("text",) if require_text else ()
        scores = ("score_vmafmotion",) if vmaf else ()
        self.rows: TableRows | ShardedRows
        if own.memory_efficient:
            self.data = read_numbers(data_path, ("path", *texts), scores)
            self.rows = ShardedRows(data_path, len(self.data))
        else:
            table = read_table(data_path)
            hint = "scripts/cnv/meta.py adds all but path and text."
            require_columns(table, [*MEDIA_COLUMNS, *texts], data_path, hint)
            self.data = resolve_media_paths(with_numbers(table, data_path, scores), data_path)
            self.rows = TableRows(self.data)
        self.vmaf = vmaf and "score_vmafmotion" in self.rows.columns
        self._numbers = {name: self.data[name].to_numpy() for name in ("num_frames", "fps")}
        self._decoded: dict[int, np.ndarray] | None = {} if own.keep_in_memory else None

    def strides(self) -> np.ndarray:
        """Distance between the frames taken of each row: int32 ``[N]``."""
        return frame_strides(self.data["fps"].to_numpy(dtype=np.float64), self.fps_max)

    def row(self, index: int) -> dict[str, Any]:
        """Values of a row by column, wherever they are kept."""
        return {**self.rows[index], **{name: values[index] for name, values in self._numbers.items()}}

    def clip(self, key: SampleKey, row: dict[str, Any]) -> torch.Tensor:
        """Pixels ``[3, T, H, W]`` in [-1, 1]."""
        stride = target_fps(_number(row["fps"]), self.fps_max)[1]
        picture = is_picture(row["path"])
        if picture and key.num_frames > 1:
            raise BrokenMediaError(f"{row['path']}: a picture, but num_frames is {row['num_frames']} in its row")
        if picture:
            frames = read_image(row["path"])[None]
        else:
            frames = self._frames(key, row, stride, np.random.default_rng([key.seed, key.row]))
        return fit_frames(frames, key.height, key.width, picture, TRANSFORMS[self.transform_name])

    def caption(self, key: SampleKey, row: dict[str, Any]) -> str:
        """Text as the encoders get it, frame rate and motion score included."""
        fps = target_fps(_number(row["fps"]), self.fps_max)[0] if key.num_frames > 1 else 0
        motion = _number(row["score_vmafmotion"]) if self.vmaf else None
        return add_suffix(super().caption(key, row), fps, self.fps_max, motion)

    def _frames(self, key: SampleKey, row: dict[str, Any], stride: int, rng: np.random.Generator) -> np.ndarray:
        indices = choose_frames(int(row["num_frames"]), key.num_frames, stride, rng)
        if self._decoded is None:
            return read_frames(row["path"], indices.tolist(), _number(row["fps"]))
        if key.row not in self._decoded:
            everything = list(range(int(row["num_frames"])))
            self._decoded[key.row] = read_frames(row["path"], everything, _number(row["fps"]))
        return self._decoded[key.row][indices]


def _number(value: Any) -> float:
    """A cell as a number, NaN where it is empty."""
    return math.nan if value is None else float(value)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of samples and list everything else.

    ``video`` holds the clips that were read, ``read`` their positions in the batch; without any there is neither.
    What was broken is gathered in ``broken``. Where a sample failed (see :meth:`ClipDataset.__getitem__`) there
    is no batch, only ``broken`` and ``failed``, the rows asked for.

    Raises:
        UserError: tensors of different sizes, which only latents or embeddings from a user's own files can have.
    """
    broken = [entry for sample in samples for entry in sample.get("broken", ())]
    failed = [sample["index"] for sample in samples if sample.keys() <= {"index", "broken"}]
    if failed:
        return {"broken": broken, "failed": failed}
    keys = [key for key in samples[0] if key not in ("broken", "video")]
    batch = {**{key: _join(key, [sample[key] for sample in samples], samples) for key in keys}, "broken": broken}
    read = [position for position, sample in enumerate(samples) if "video" in sample]
    if read:
        batch |= {"video": torch.stack([samples[position]["video"] for position in read]), "read": read}
    return batch


def collate_as_bytes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of :func:`collate`, clips as uint8 where that is exact for all (:func:`transforms.as_bytes`): a quarter
    of what processes hand on, and of what is copied to a GPU."""
    clips = [as_bytes(sample["video"]) for sample in samples if "video" in sample]
    if not all(clip.dtype == torch.uint8 for clip in clips):
        return collate(samples)
    packed = iter(clips)
    return collate([{**sample, "video": next(packed)} if "video" in sample else sample for sample in samples])


def _join(name: str, values: list[Any], samples: list[dict[str, Any]]) -> Any:
    """One tensor of several, a list of anything else."""
    if not torch.is_tensor(values[0]):
        return values
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        sizes = ", ".join(f"row {row_number(sample['index'])}: {list(v.shape)}" for sample, v in zip(samples, values))
        raise UserError(f"{name}: the samples of one bucket differ in size ({sizes})")
    return torch.stack(values)
