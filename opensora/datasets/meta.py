"""What the files of a table are: length, size and frame rate, read from container headers.

Decoding whole clips would take hours for what a header says in a millisecond. A header is believed when it agrees with
itself and with the end of the file; otherwise the packets of the file are counted, which still decodes nothing.
"""

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import av
import pandas as pd
from av.error import FFmpegError
from PIL import Image
from tqdm import tqdm

from opensora.datasets.table import check_table_name, locate, read_table, require_columns, row_number, write_table
from opensora.datasets.video_io import BrokenMediaError
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.video import IMAGE_EXTENSIONS

logger = get_logger(__name__)

META_COLUMNS = ("num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
CHUNK = 16  # files handed to a worker at a time


@dataclass(frozen=True)
class MediaInfo:
    """Frames (1 for a picture), pixels, and frames per second (NaN for a picture)."""

    num_frames: int
    height: int
    width: int
    fps: float


def probe_media(path: str | Path) -> MediaInfo:
    """Length, size and rate of a video or picture.

    A video's first frame is decoded to see that the codec works and how large frames really are; frames are counted
    only where the header leaves them out, contradicts itself, or promises more than the file holds.

    Raises:
        BrokenMediaError: missing or unreadable; the message says why.
    """
    path = Path(path)
    if not path.is_file():
        raise BrokenMediaError(f"{path}: no such file")
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        return _probe_image(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BrokenMediaError(f"{path}: no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            first = next(container.decode(stream), None)
            if first is None:
                raise BrokenMediaError(f"{path}: not one frame can be decoded")
            rate = float(stream.average_rate or stream.base_rate or 0)
            count = stream.frames if _header_holds(container, stream, rate) else 0
        count = count or _count_packets(path)
    except (FFmpegError, OSError, IndexError, ValueError) as error:
        raise BrokenMediaError(f"{path}: cannot be read ({error})") from error
    if count < 1 or rate <= 0:
        raise BrokenMediaError(f"{path}: {count} frames at {rate:g} frames per second")
    return MediaInfo(count, first.height, first.width, round(rate, 3))


def _probe_image(path: Path) -> MediaInfo:
    try:
        with Image.open(path) as image:
            width, height = image.size
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenMediaError(f"{path}: cannot be read as a picture ({error})") from error
    return MediaInfo(1, height, width, math.nan)


def _header_holds(container: "av.container.InputContainer", stream: "av.VideoStream", rate: float) -> bool:
    """Whether the header's number of frames agrees with its duration and with where the packets end."""
    if not stream.frames or not stream.duration or not stream.time_base or rate <= 0:
        return False
    per_frame = 1 / (rate * float(stream.time_base))
    if abs(stream.duration / per_frame - stream.frames) > 1.5:
        return False
    end = (stream.start_time or 0) + stream.duration
    try:
        container.seek(end, stream=stream, backward=True)
        ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None and p.size]
    except (FFmpegError, OSError):
        return False  # the file ends before its header says: the packets that are there get counted
    return end - max(ends, default=0) < 1.5 * per_frame


def _count_packets(path: Path) -> int:
    """Packets that hold a shown frame; a file cut short is counted up to the cut."""
    count = 0
    with av.open(str(path)) as container:
        try:
            for packet in container.demux(container.streams.video[0]):
                count += bool(packet.size and not packet.is_discard)
        except FFmpegError:
            pass
    return count


def _probe_row(path: str) -> MediaInfo | str:
    """Result or reason; a plain value, since it comes from another process."""
    try:
        return probe_media(path)
    except BrokenMediaError as error:
        return str(error)


def _probe_all(paths: list[str], num_workers: int) -> Iterator[MediaInfo | str]:
    workers = min(num_workers, math.ceil(len(paths) / CHUNK))
    if workers <= 1:
        yield from map(_probe_row, paths)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(_probe_row, paths, chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise UserError("a worker died reading a file; --num_workers 0 shows after which one") from error


def add_media_columns(
    table: pd.DataFrame, folder: Path, num_workers: int = 0, progress: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Probe every file of a table.

    Args:
        table: has a column ``path``; relative paths are found as :func:`opensora.datasets.table.locate` does.
        folder: of the table.
        num_workers: processes; 0 works in this one.
        progress: show a bar with rate and time left.

    Returns:
        The readable rows with :data:`META_COLUMNS` (aspect_ratio is height / width, resolution height x width), and
        the unreadable ones as they were with columns ``row`` (line in the file, the header being 1) and ``error``.
    """
    paths = [str(locate(str(raw), folder)) for raw in table["path"]]
    results: Iterable[MediaInfo | str] = _probe_all(paths, num_workers)
    results = list(tqdm(results, total=len(paths), unit="file", disable=not progress, mininterval=1.0))
    found = {i: r for i, r in enumerate(results) if isinstance(r, MediaInfo)}
    good = table.iloc[list(found)].drop(columns=[c for c in META_COLUMNS if c in table.columns])
    infos = list(found.values())
    good = good.assign(
        num_frames=[i.num_frames for i in infos],
        height=[i.height for i in infos],
        width=[i.width for i in infos],
        aspect_ratio=[i.height / i.width for i in infos],
        resolution=[i.height * i.width for i in infos],
        fps=[i.fps for i in infos],
    )
    bad = [(i, reason) for i, reason in enumerate(results) if isinstance(reason, str)]
    broken = table.iloc[[i for i, _ in bad]].assign(
        row=[row_number(i) for i, _ in bad], error=[reason for _, reason in bad]
    )
    return good, broken


def write_meta(
    source: str | Path, target: str | Path, num_workers: int | None = None, overwrite: bool = False
) -> tuple[int, int]:
    """Complete a table with what its files are: the whole of ``scripts/cnv/meta.py``.

    Unreadable files are left out of ``target`` and listed with the reason in ``<target stem>_broken.csv`` beside it; a
    list of an earlier call is replaced. Relative paths that would not be found from the target's folder are made
    absolute.

    Args:
        source, target: ``.csv`` or ``.parquet`` each.
        num_workers: processes; None takes one per CPU core, 0 works in this process.
        overwrite: replace existing results.

    Returns:
        Numbers of readable and of unreadable files.

    Raises:
        UserError: a table that is missing, empty or without ``path``, an existing target, or no readable file.
    """
    source, target = Path(source), Path(target)
    check_table_name(target)
    broken_path = target.with_name(f"{target.stem}_broken.csv")
    for path in (target, broken_path):
        if path.exists() and not overwrite and not (path == broken_path and _lists_broken(path)):
            raise UserError(f"{path} exists already: give another --output, or --overwrite to replace it")
    table = read_table(source)
    require_columns(table, ["path"], source)
    if table.empty:
        raise UserError(f"{source}: has no rows")
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    good, broken = add_media_columns(table, source.parent, workers, progress=True)
    if len(broken):
        write_table(broken, broken_path)
        logger.warning("%d of %d files are unreadable, see %s", len(broken), len(table), broken_path)
    else:
        broken_path.unlink(missing_ok=True)
    if good.empty:
        raise UserError(f"{source}: none of its {len(table)} files is readable; the reasons are in {broken_path}")
    if source.parent.resolve() != target.parent.resolve():
        good = good.assign(path=[_portable(str(raw), source.parent) for raw in good["path"]])
    write_table(good, target)
    return len(good), len(broken)


def _lists_broken(path: Path) -> bool:
    """Whether a file is the list of unreadable files that an earlier `write_meta` left."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip().endswith("row,error")


def _portable(raw: str, folder: Path) -> str:
    """The path as it is if it is found from the working directory, else absolute."""
    found = locate(raw, folder)
    return raw if str(found) == raw else str(found.resolve())
