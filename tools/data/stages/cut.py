"""Shots to clips: H.264 files of constant rate, upright, square pixels, without black borders, exact to the frame."""

# ruff: noqa: RUF009 - opt() makes dataclass fields

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import polars as pl
from PIL import Image

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside
from opensora.utils.media.decoded import Decoder
from opensora.utils.media.kinds import video_stream
from opensora.utils.media.orientation import Orientation
from opensora.utils.media.pictures import read_picture
from opensora.utils.media.pixels import tag_bt709
from opensora.utils.media.timing import same_rate
from tools.data.engine.decode import Shower, Shown, clip_info, decode, luma, open_video
from tools.data.engine.stage import (
    LARGEST_SIDE,
    SMALLEST_SIDE,
    Row,
    Stage,
    Worker,
    check_order,
    digest,
    shrink,
    values_of,
)
from tools.data.stages.ingest import hash_file

BORDER_SAMPLES = (0.1, 0.5, 0.9)  # of a shot: where its borders are looked at
RATE_SLACK = 0.05  # how far above max_fps an average rate may be before every other frame is left out
SPECKS = 0.01  # share of a row or column that may be bright in a border: noise, and ringing of compression
EVEN = 4  # levels of brightness by which the black of a border may differ
EDGE, STRAIGHT = 3, 0.5  # lines at a picture's edge, of one of which so much is bright where a border ends
FULL_RANGE = 2  # FFmpeg's number
SCALING = "bicubic+accurate_rnd"
THIN = 0.1  # of a side: borders that need none like them at the opposite side
ALIKE, ALL_ALIKE = 0.5, 0.8  # of the larger of two opposite borders: how much the smaller one must be; all around
MIN_LEFT = 0.3  # of a side: a border that would leave less is a dark picture
SHORT_SHOT, SHORT_REST = "shot too short", "rest of a shot too short"
SLOWEST = Fraction(1, 1001)  # frames per second
TOLERANCE = 0.25  # of a frame: how far time stamps may be off

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]

CLIP_COLUMNS = {
    "clip_id": pl.String,
    "clip_path": pl.String,
    "start": pl.Float64,
    "end": pl.Float64,
    "num_frames": pl.Int32,
    "height": pl.Int32,
    "width": pl.Int32,
    "fps": pl.Float64,
    "keep": pl.Boolean,
    "reason": pl.String,
}
Box = tuple[int, int, int, int]  # left, top, width, height
Frames = Iterator[tuple[float, Any]]


@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    """What a clip looks like."""

    min_seconds: float = opt(2.0, "shots below give no clip", "s", least=0, most=1e6)
    max_seconds: float = opt(8.0, "longer shots give several clips", "s", above=0, most=1e6)
    max_side: int = opt(1080, "long side; larger ones are shrunk", "px", least=SMALLEST_SIDE, most=LARGEST_SIDE)
    max_fps: float = opt(30.0, "higher rates are thinned out by a whole number", "frames/s", least=1, most=1e3)
    remove_borders: bool = opt(True, "cut off black borders")
    border_level: int = opt(24, "brightness up to which a row or column is black", "0..255", least=0, most=255)
    crf: int = opt(18, "x264 quality: 0 lossless, 51 worst", least=0, most=51)
    preset: Preset = opt("veryfast", "x264 speed")


class Cut(Stage):
    """One row per clip, and one that is out for everything too short to be one."""

    settings: CutOptions

    name = "cut"
    version = 4
    reads = ("path", "kind", "source_id", "scenes")
    identity = ("source_id", "scenes")
    adds = CLIP_COLUMNS
    expands = True
    files = ("clip_path",)
    folders = ("clips",)

    def check(self) -> None:
        """Some length is left."""
        check_order("cut.min_seconds", self.settings.min_seconds, "cut.max_seconds", self.settings.max_seconds)

    def worker(self) -> Worker:
        """Cut one source."""

        def cut(row: Row) -> list[Row]:
            if row["kind"] == "image":
                return [self._image(row)]
            pieces = split_scenes(row["scenes"], self.settings.min_seconds, self.settings.max_seconds)
            clips = iter(self._video(row, [piece.span for piece in pieces if not piece.reason]))
            rows = [_out(piece) if piece.reason else next(clips) for piece in pieces]
            return rows or [{"keep": False, "reason": "no shots"}]

        return cut

    def clip_id(self, source_id: str, start: float, end: float) -> str:
        """Of content, place and cut settings; never of the path."""
        return digest([source_id, round(start, 4), round(end, 4), values_of(self.settings), self.version])

    def _target(self, clip_id: str, suffix: str) -> Path:
        return self.root / "clips" / clip_id[:2] / f"{clip_id}{suffix}"

    def _video(self, row: Row, spans: list[tuple[float, float]]) -> list[Row]:
        path = Path(row["path"])
        clips = [(self.clip_id(row["source_id"], *span), *span) for span in spans]
        targets = [self._target(clip_id, ".mp4") for clip_id, _, _ in clips]
        if not all(target.is_file() for target in targets):
            boxes, fps = find_borders(path, spans, self.settings), clip_info(path).fps
            with open_video(path) as container:
                frames = _Pushback(decode(container, path.name))
                for target, (start, end), box in zip(targets, spans, boxes):
                    encode = _Encoder(container, fps, start, end, box, self.settings)
                    write_beside(target, lambda temporary: encode(frames, temporary))  # noqa: B023
        return [self._row(*clip, target) for clip, target in zip(clips, targets)]

    def _image(self, row: Row) -> Row:
        clip_id = self.clip_id(row["source_id"], 0.0, 0.0)
        target = self._target(clip_id, ".png")
        image = read_picture(row["path"])
        if self.settings.remove_borders:
            left, top, width, height = content_box(image.max(axis=2), self.settings.border_level)
            image = image[top : top + height, left : left + width]
        image = shrink(image, self.settings.max_side)
        write_beside(target, Image.fromarray(image).save)
        return self._row(clip_id, 0.0, 0.0, target)

    def _row(self, clip_id: str, start: float, end: float, target: Path) -> Row:
        info = clip_info(target)
        return {
            "clip_id": clip_id,
            "clip_path": target.relative_to(self.root).as_posix(),
            "start": start,
            "end": end,
            "num_frames": info.num_frames,
            "height": info.height,
            "width": info.width,
            "fps": info.fps or None,
            "keep": True,
            "reason": "",
        }


class Whole(Stage):
    """Instead of scenes and cut: every file is one clip as it is. For clips that others have cut."""

    name = "whole"
    reads = ("path", "kind", "source_id", "source_seconds")
    identity = ("source_id",)
    adds = {name: kind for name, kind in CLIP_COLUMNS.items() if name not in ("keep", "reason")}

    def worker(self) -> Worker:
        """Take one file."""

        def take(row: Row) -> list[Row]:
            path = Path(row["path"]).resolve()
            info = clip_info(path)
            return [
                {
                    "clip_id": row["source_id"] or hash_file(path),
                    "clip_path": str(path),
                    "start": 0.0,
                    "end": row["source_seconds"] or 0.0,
                    "num_frames": info.num_frames,
                    "height": info.height,
                    "width": info.width,
                    "fps": info.fps or None,
                }
            ]

        return take


@dataclass(frozen=True)
class Piece:
    """A piece of a shot, in seconds of the source; ``reason`` says why it is no clip, empty if it is one."""

    span: tuple[float, float]
    reason: str = ""


def _out(piece: Piece) -> Row:
    return {"start": piece.span[0], "end": piece.span[1], "keep": False, "reason": piece.reason}


def split_scenes(scenes: list[list[float]], shortest: float, longest: float) -> list[Piece]:
    """Shots in pieces of at most ``longest`` seconds, of which those below ``shortest`` are out."""
    pieces = []
    for start, end in scenes:
        count = max(math.ceil((end - start) / longest - 1e-3), 1)
        for number in range(count):
            span = (start + number * longest, min(start + (number + 1) * longest, end))
            short = span[1] - span[0] < shortest - 1e-3
            pieces.append(Piece(span, (SHORT_SHOT if count == 1 else SHORT_REST) if short else ""))
    return pieces


def content_box(image: np.ndarray, level: int) -> Box:
    """What is left of a picture (uint8 [H, W], brightest over time) without its black borders.

    Dark is not black: what goes is even, ends in a straight line at which the picture begins, and is the same at the
    opposite side unless it is thin. A night sky, a vignette or a light in the dark is not like that, and stays.
    """
    height, width = image.shape
    whole = (0, 0, width, height)
    bright = image > level
    rows = np.flatnonzero(bright.mean(axis=1) > SPECKS)
    columns = np.flatnonzero(bright.mean(axis=0) > SPECKS)
    if len(rows) == 0 or len(columns) == 0:
        return whole
    left, right, top, bottom = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
    inner = bright[top:bottom, left:right]  # a border's line is as long as the picture within, not as the frame
    top = top if _is_border(image[:top], inner[:EDGE]) else 0
    bottom = bottom if _is_border(image[bottom:][::-1], inner[-EDGE:]) else height
    left = left if _is_border(image[:, :left].T, inner[:, :EDGE].T) else 0
    right = right if _is_border(image[:, right:].T[::-1], inner[:, -EDGE:].T) else width
    rows_alike, columns_alike = _alike(top, height - bottom, height), _alike(left, width - right, width)
    if rows_alike < ALIKE:
        top, bottom = 0, height
    if columns_alike < ALIKE:
        left, right = 0, width
    if (top, bottom) != (0, height) and (left, right) != (0, width) and min(rows_alike, columns_alike) < ALL_ALIKE:
        return whole  # borders all around are rarer than something bright in the dark
    if bottom - top < MIN_LEFT * height or right - left < MIN_LEFT * width:
        return whole
    return left, top, right - left, bottom - top


def _alike(one: int, other: int, side: int) -> float:
    """The smaller of two opposite borders by the larger one; 1 for thin ones, as careless cropping leaves them."""
    return 1.0 if max(one, other) <= THIN * side else min(one, other) / max(one, other)


def _is_border(outside: np.ndarray, edge: np.ndarray) -> bool:
    """Whether what lies outside of a picture is one black, and the lines at its edge are bright.

    Args:
        outside: lines [N, length] from the frame's edge to the picture. Compression rings in the last of them.
        edge: lines [N, length] of the picture, as far as it reaches.
    """
    if outside.size == 0:
        return False
    darkest, brightest = np.percentile(outside[: max(len(outside) - EDGE, 1)], (2, 98))
    return bool(brightest - darkest <= EVEN and edge.mean(axis=1).max() >= STRAIGHT)


def find_borders(path: Path, spans: list[tuple[float, float]], settings: CutOptions) -> list[Box | None]:
    """Content box of each span in frames as :class:`Shower` gives them; None where nothing is to be cut off.

    Key frames are looked at first, since they cost least. A border that they show may still be a fade or a light that
    is not on yet (a shot's only key frame may be its first), so it has to be there in the middle of the shot, too.
    """
    if not settings.remove_borders:
        return [None] * len(spans)
    boxes: list[Box | None] = []
    with open_video(path) as container:
        stream = video_stream(container)
        shower, decoder = Shower(stream), Decoder(stream)
        origin = float((stream.start_time or 0) * (stream.time_base or 0))
        for start, end in spans:
            times = [origin + start + share * (end - start) for share in BORDER_SAMPLES]
            images: list[np.ndarray] = []
            box: Box | None = None
            for firsts in ([origin + start] * len(times), times):
                images += [
                    image
                    for time, first in zip(times, firsts)
                    if (image := _frame_at(container, decoder, shower, time, first)) is not None
                ]
                box = _common_box(images, settings.border_level)
                if box is None:
                    break
            boxes.append(box)
    return boxes


def _common_box(images: list[np.ndarray], level: int) -> Box | None:
    """Content box of pictures of one size together; None if that is all of them, or there are none."""
    same = [image for image in images if image.shape == images[0].shape]
    if not same:
        return None
    box = content_box(np.max(same, axis=0), level)
    return None if box[2:] == same[0].shape[::-1] else box


def _frame_at(container: Any, decoder: Decoder, shower: Shower, time: float, first: float) -> np.ndarray | None:
    """Luma of the first frame from the key frame before ``time`` on that is shown at ``first`` or later."""
    stream = video_stream(container)
    try:
        container.seek(int(time / (stream.time_base or 1)), stream=stream)
        decoder.context.flush_buffers()
        for frame in chain.from_iterable(map(decoder, container.demux(stream))):
            if frame.time is None or frame.time >= first - 1e-3:
                return luma(shower(frame).frame).copy()
    except (av.FFmpegError, ValueError):
        return None  # not seekable here: the other samples have to do
    return None


class _Pushback:
    """Frames of which the last one taken can be given back."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.held: tuple[float, Any] | None = None

    def next(self) -> tuple[float, Any] | None:
        if self.held is not None:
            item, self.held = self.held, None
            return item
        return next(self.frames, None)


class _Encoder:
    """Encodes the frames of one span at a constant rate: the header's, or the mean rate ``fps`` where it is another."""

    def __init__(
        self, container: Any, fps: float, start: float, end: float, box: Box | None, settings: CutOptions
    ) -> None:
        self.source = video_stream(container)
        self.shower = Shower(self.source)
        header = self.source.average_rate
        rate = header if header and same_rate(header, fps) else max(Fraction(fps).limit_denominator(1001), SLOWEST)
        # Phones record at about 30: the average of such a file may be 30.1, which is no reason to halve it.
        self.stride = max(math.ceil(float(rate) / settings.max_fps - RATE_SLACK), 1)
        self.rate = Fraction(rate).limit_denominator(1001) / self.stride
        if self.rate > settings.max_fps * (1 + 1e-3):
            self.rate = Fraction(settings.max_fps).limit_denominator(1001)
        self.slack = TOLERANCE / float(rate)
        self.start, self.end, self.box, self.settings = start, end, box, settings
        self.count = max(round((end - start) * float(self.rate)), 1)

    def __call__(self, frames: _Pushback, path: Path) -> None:
        """Write the clip. Each of its frames is the source's last one at or before its time.

        Raises:
            UserError: the source has no frame in this span.
        """
        graph: Any = None
        with av.open(str(path), "w") as target:
            stream: Any = None
            for number, frame in enumerate(self._on_grid(frames)):
                given = self.shower(frame)
                if graph is None:
                    graph = self._graph(given)
                given.frame.pts, given.frame.time_base = number, 1 / self.rate
                graph.push(given.frame)
                shown = graph.pull()
                stream = stream or self._stream(target, shown)
                shown.pts, shown.time_base, shown.pict_type = number, 1 / self.rate, 0
                target.mux(stream.encode(shown))
            if stream is None:
                raise UserError(f"no frame between {self.start:.3f} s and {self.end:.3f} s")
            target.mux(stream.encode())

    def _on_grid(self, frames: _Pushback) -> Iterator[Any]:
        held: Any = None
        number = 0
        while number < self.count:
            item = frames.next()
            time = item[0] if item else math.inf
            if time < self.start - self.slack:
                continue
            over = time >= self.end - self.slack
            while held is not None and number < self.count and (over or self._time(number) + self.slack < time):
                yield held
                number += 1
            if over:
                frames.held = item
                return
            if item:
                held = item[1]
        frames.held = item

    def _time(self, number: int) -> float:
        return self.start + number / float(self.rate)

    def _graph(self, given: Shown) -> Any:
        """Filters to upright, square, without borders, of even size, in the limited range of BT.709."""
        frame = given.frame
        left, top, width, height = self.box or (0, 0, frame.width, frame.height)
        shown = given.upright.size(height, round(width * given.aspect))
        scale = min(self.settings.max_side / max(shown), 1.0)
        size = tuple(max(int(side * scale) // 2 * 2, 2) for side in shown)
        # One odd row or column is cut off rather than the picture be resampled for it.
        exact = scale == 1.0 and given.aspect == 1.0
        steps = [("crop", f"{width}:{height}:{left}:{top}:exact=1"), *_turned(given.upright)]
        steps += [("crop", f"{size[1]}:{size[0]}:0:0:exact=1")] if exact else []
        if not exact or given.matrix != "bt709" or int(frame.color_range) == FULL_RANGE or not given.matrix:
            matrix = f":in_color_matrix={given.matrix}" if given.matrix else ""
            steps.append(("scale", f"{size[1]}:{size[0]}:flags={SCALING}{matrix}:out_color_matrix=bt709:out_range=tv"))
        steps += [("setsar", "1"), ("format", "yuv420p")]
        graph = av.filter.Graph()
        graph.threads = 1
        last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=1 / self.rate)
        for name, arguments in steps:
            node = graph.add(name, arguments) if arguments else graph.add(name)
            last.link_to(node)
            last = node
        last.link_to(graph.add("buffersink"))
        graph.configure()
        return graph

    def _stream(self, target: Any, shown: Any) -> Any:
        from opensora.utils.video import SAME_EVERYWHERE  # not above: it imports torch, and --help reads this file

        stream = target.add_stream("libx264", rate=self.rate)
        stream.width, stream.height = shown.width, shown.height
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(self.settings.crf), "preset": self.settings.preset, **SAME_EVERYWHERE}
        stream.codec_context.thread_count = 1  # threads would change nothing but the time, and the pool has them all
        tag_bt709(stream.codec_context)
        return stream


def _turned(upright: Orientation) -> list[tuple[str, str]]:
    """Filters for an orientation: FFmpeg's transposition 0 is the plain one, rows for columns."""
    wanted = {
        ("transpose", "0"): upright.transpose,
        ("vflip", ""): upright.flip_rows,
        ("hflip", ""): upright.flip_columns,
    }
    return [step for step, is_wanted in wanted.items() if is_wanted]
