"""Which clips an autoencoder is judged on, at which size, and reading them."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from opensora.config.commands import VaeInferenceOptions
from opensora.datasets.buckets import BucketTable
from opensora.datasets.config import VideoTextConfig
from opensora.datasets.dataset import target_fps
from opensora.datasets.meta import probe_media
from opensora.datasets.rows import with_numbers
from opensora.datasets.source import ClipSource, SampleKey, build_source
from opensora.datasets.table import MEDIA_COLUMNS, read_table, require_columns, resolve_media_paths
from opensora.datasets.transforms import fit_frames
from opensora.datasets.video_io import BrokenMediaError, read_frames, read_image
from opensora.models.autoencoder import Autoencoder
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.media.kinds import is_picture, kind_of
from opensora.utils.paths import expand_home
from opensora.utils.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

logger = get_logger(__name__)

MIN_SIDE = 16  # px; what the measures need
SIZE_MULTIPLE = 16
NAMED = 3  # clips listed in messages
RESULTS = ("orig", "recn", "side_by_side", "sheet.png")  # what reconstruction writes below save_dir, to look at


@dataclass(frozen=True)
class EvalClip:
    """A clip or picture and what is taken of it.

    Args:
        name: its files in the results are called so; unique.
        path: where it is.
        num_frames, height, width: what is taken; the frames from the first one on.
        stride: distance of the frames.
        fps: of the file, NaN for pictures.
        keep_scale: cut the size out of the middle; otherwise the frames are scaled to it first.
        modified: when the file was last written, in seconds of the system's clock; NaN if that does not matter.
        row: of the user's own dataset that makes the clip; None where it is read from the file.
    """

    name: str
    path: str
    num_frames: int
    height: int
    width: int
    stride: int
    fps: float
    keep_scale: bool = False
    modified: float = math.nan
    row: int | None = None


def parse_eval_setting(text: str) -> tuple[int, int, int]:
    """(frames, height, width) of ``17x256`` (square) or ``17x256x320``.

    Raises:
        UserError: another form.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise UserError(
            f"eval_setting={text!r}: expected frames x side (17x256) or frames x height x width (17x256x320)"
        )
    frames, height, *width = map(int, text.split("x"))
    return frames, height, width[0] if width else height


def list_media(data_path: str | Path, save_dir: str | Path | None = None) -> pd.DataFrame:
    """Path, frames, size and rate of the clips of a table, or of the clips and pictures of a folder (and below it).

    Args:
        data_path: table or folder.
        save_dir: where results go; if that is in the folder, those of an earlier call are not clips of it.

    Raises:
        UserError: no such table or folder, missing columns or files, numbers that cannot be, nothing readable.
    """
    folder = expand_home(data_path)
    if not folder.is_dir():
        table = read_table(data_path)
        require_columns(table, MEDIA_COLUMNS, data_path, hint="scripts/cnv/meta.py adds all but path.")
        return resolve_media_paths(with_numbers(table, data_path), data_path)
    rows, results = [], [] if save_dir is None else [(Path(save_dir) / name).resolve() for name in RESULTS]
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if any(path.resolve().is_relative_to(result) for result in results) or not _looks_like_media(path):
            continue
        try:
            info = probe_media(path)
        except BrokenMediaError as error:
            logger.warning("left out: %s", error)
            continue
        rows.append([str(path), info.num_frames, info.height, info.width, info.fps])
    if not rows:
        raise UserError(f"{folder}: no readable videos or pictures in this folder")
    return pd.DataFrame(rows, columns=list(MEDIA_COLUMNS))


def _looks_like_media(path: Path) -> bool:
    """Whether a file is a clip or picture, or is called like one and damaged, which is worth a line in the log."""
    return path.suffix.lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS) or kind_of(path) is not None


def own_source(cfg: VaeInferenceOptions) -> ClipSource | None:
    """The config's ``dataset`` if it is of a type of the user's own; None for clips in a folder or a table of files."""
    if cfg.dataset is None or isinstance(cfg.dataset, VideoTextConfig):
        return None
    return build_source(cfg.dataset, require_text=False)


def choose_clips(
    cfg: VaeInferenceOptions, autoencoder: Autoencoder, source: ClipSource | None = None
) -> list[EvalClip]:
    """The clips of a config at the sizes it asks for: ``eval_setting``, else ``bucket_config``, else their own.

    Args:
        cfg: resolved config (``VaeInferenceOptions``).
        autoencoder: its model, on the meta device will do.
        source: of :func:`own_source`.

    Raises:
        UserError: sizes that the autoencoder does not take, or no clip is large and long enough.
    """
    table, strides = _listed_clips(cfg) if source is None else _clips_of(source)
    strides = strides * cfg.frame_interval
    sizes, asked = _sizes(cfg, autoencoder, table, strides)
    names = _names(table["path"])
    clips = [
        EvalClip(
            names[i],
            str(table["path"].iloc[i]),
            *size,
            int(strides[i]),
            float(table["fps"].iloc[i]),
            keep_scale=asked is None,
            modified=_modified(table["path"].iloc[i]),
            row=None if source is None else i,
        )
        for i, size in enumerate(sizes)
        if size is not None
    ]
    if not clips:
        where = source.data_path if source is not None else cfg.dataset and cfg.dataset.data_path
        raise UserError(f"{where}: none of {len(table)} clips is large and long enough for {asked or 'it'}")
    if len(clips) < len(table):
        left_out = [names[i] for i, size in enumerate(sizes) if size is None]
        logger.warning(
            "%d of %d clips are too short or too small and left out: %s%s",
            len(left_out),
            len(table),
            ", ".join(left_out[:NAMED]),
            " ..." if len(left_out) > NAMED else "",
        )
    return clips[: cfg.max_clips]


def _listed_clips(cfg: VaeInferenceOptions) -> tuple[pd.DataFrame, np.ndarray]:
    """Files of the config's folder or table, and the distance between the frames taken of each."""
    section = cfg.dataset
    if section is None or not section.data_path:
        raise UserError("dataset.data_path is not set: give a table of clips, or a folder of videos and pictures")
    table = list_media(section.data_path, cfg.save_dir)
    fps_max = section.fps_max if isinstance(section, VideoTextConfig) and "fps_max" in section.given else float("inf")
    return table, np.array([target_fps(float(fps), fps_max)[1] for fps in table["fps"]])


def _clips_of(source: ClipSource) -> tuple[pd.DataFrame, np.ndarray]:
    """The same of a user's own dataset, which need not have rates, nor files at its paths."""
    paths = [str(source.row(i)["path"]) for i in range(len(source))]
    fps = source.data.get("fps", math.nan)
    return source.data[["num_frames", "height", "width"]].assign(path=paths, fps=fps), source.strides()


def _modified(path: str) -> float:
    """When a file was last written; NaN where a path is the name of a clip and no more."""
    return Path(path).stat().st_mtime if Path(path).exists() else math.nan


def _sizes(
    cfg: VaeInferenceOptions, autoencoder: Autoencoder, table: pd.DataFrame, strides: np.ndarray
) -> tuple[list[tuple[int, int, int] | None], str | None]:
    """Size of each row, None where it cannot have one; and what was asked for, in words."""
    available = np.where(table["num_frames"] > 1, -(-table["num_frames"].to_numpy() // strides), 1)
    if cfg.eval_setting:
        size = parse_eval_setting(cfg.eval_setting)
        check_size(size, autoencoder, f"eval_setting={cfg.eval_setting}")
        return [size if frames >= size[0] else None for frames in available], f"eval_setting={cfg.eval_setting}"
    if cfg.bucket_config:
        certain = {
            name: dict.fromkeys(lengths, (1.0, 1)) for name, lengths in cfg.bucket_config.items()
        }  # every clip counts, whatever share of them training would take
        buckets = BucketTable(certain, max(SIZE_MULTIPLE, *autoencoder.compression[1:]))
        for bucket in buckets.buckets:
            size = (bucket.num_frames, bucket.height, bucket.width)
            check_size(size, autoencoder, f"bucket_config[{bucket.resolution!r}]")
        numbers = buckets.assign(table, strides, seed=0)
        chosen = [None if n < 0 else buckets.buckets[n] for n in numbers]
        return [None if b is None else (b.num_frames, b.height, b.width) for b in chosen], "bucket_config"
    own = zip(available, table["height"], table["width"])
    return [own_size(int(t), int(h), int(w), autoencoder) for t, h, w in own], None


def own_size(frames: int, height: int, width: int, autoencoder: Autoencoder) -> tuple[int, int, int] | None:
    """Largest size within a clip's that the autoencoder takes, None if there is none."""
    rows, columns = autoencoder.compression[1:]
    length = autoencoder.nearest_frames(frames)[0]
    size = (length if autoencoder.keeps_length(length) else 1, height // rows * rows, width // columns * columns)
    return size if min(size[1:]) >= MIN_SIDE else None


def check_size(size: tuple[int, int, int], autoencoder: Autoencoder, where: str) -> None:
    """Refuse a size that the autoencoder does not take.

    Raises:
        UserError: names the nearest one that it does.
    """
    frames, height, width = size
    if own_size(frames, height, width, autoencoder) != size:
        ratios = autoencoder.compression
        enough = [max(round(s / r) * r, -(-MIN_SIDE // r) * r) for s, r in zip(size[1:], ratios[1:])]
        nearest = own_size(frames, enough[0], enough[1], autoencoder)
        assert nearest is not None
        raise UserError(
            f"{where}: the autoencoder does not take {frames} frames of {height}x{width}; "
            f"nearest: {'x'.join(map(str, nearest))}"
        )


def _names(paths: pd.Series) -> list[str]:
    """Stem of each path; with the row's number where several have the same. No name occurs twice."""
    stems = [Path(path).stem for path in paths]
    counts = Counter(stems)
    taken, names = {stem for stem, count in counts.items() if count == 1}, []
    for row, stem in enumerate(stems):
        name = stem if counts[stem] == 1 else f"{stem}_{row:05d}"
        while counts[stem] > 1 and name in taken:  # another file is called like a stem with a number
            name += "_"
        taken.add(name)
        names.append(name)
    return names


class ClipReader(Dataset):
    """Clips as tensors ``[3, T, H, W]`` in [-1, 1]; None for one that turns out to be unreadable, which is logged.

    Args:
        clips: what to read.
        source: dataset of those that have a ``row``.
    """

    def __init__(self, clips: list[EvalClip], source: ClipSource | None = None) -> None:
        self.clips, self.source = clips, source
        self._strides = source.strides() if source is not None else None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor | None:
        clip = self.clips[index]
        try:
            if self.source is None or self._strides is None or clip.row is None:
                return read_clip(clip)
            return read_row(self.source, clip, clip.row, clip.stride // int(self._strides[clip.row]))
        except (BrokenMediaError, UserError) as error:
            logger.warning("left out: %s", error)
            return None


def read_row(source: ClipSource, clip: EvalClip, row: int, interval: int) -> Tensor:
    """``[3, T, H, W]`` in [-1, 1] of a row of a user's own dataset, which fits it to the size itself.

    Args:
        source: the dataset.
        clip: gives the size.
        row: number of the row.
        interval: distance of the frames, counted in those that the dataset gives.

    Raises:
        BrokenMediaError, UserError: it cannot be read.
    """
    key = SampleKey(row, (clip.num_frames - 1) * interval + 1, clip.height, clip.width, seed=0)
    return source.clip(key, source.row(row))[:, ::interval]


def read_clip(clip: EvalClip) -> Tensor:
    """``[3, T, H, W]`` in [-1, 1] of a clip.

    Raises:
        BrokenMediaError, UserError: it cannot be read, or is shorter or smaller than the table says.
    """
    picture = is_picture(clip.path)
    if not picture:
        indices = [i * clip.stride for i in range(clip.num_frames)]
        frames = read_frames(clip.path, indices, clip.fps if clip.fps > 0 else None)
    elif clip.num_frames > 1:
        raise BrokenMediaError(f"{clip.path}: a picture, where the table says {clip.num_frames} frames or more")
    else:
        frames = read_image(clip.path)[None]
    if clip.keep_scale:
        height, width = frames.shape[1:3]
        if height < clip.height or width < clip.width:
            raise BrokenMediaError(
                f"{clip.path}: {height}x{width} px, where the table says {clip.height}x{clip.width} or more; "
                "scripts/cnv/meta.py measures it"
            )
        top, left = ((have - want) // 2 for have, want in zip(frames.shape[1:3], (clip.height, clip.width)))
        frames = frames[:, top : top + clip.height, left : left + clip.width]
    return fit_frames(frames, clip.height, clip.width, picture)


def bucket_of(eval_setting: str) -> Mapping[str, Mapping[int, Any]]:
    """The bucket that ``eval_setting`` (square) stands for.

    Raises:
        UserError: not square.
    """
    frames, height, width = parse_eval_setting(eval_setting)
    if height != width:
        raise UserError(f"eval_setting={eval_setting}: only squares here; give {frames}x{height}, or bucket_config")
    return {f"{height}px_ar1:1": {frames: (1.0, 1)}}
