"""Find raw files, look into their headers, drop what is hopeless."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError
from opensora.utils.video import is_video, read_image
from tools.data.engine.decode import decode, frame_rate, open_video, turns
from tools.data.engine.stage import DIGEST_CHARS, Row, Stage, Worker, check_order

CHUNK = 1 << 22


def hash_file(path: Path) -> str:
    """Hash of a file's whole content."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content.update(chunk)
    return content.hexdigest()[:DIGEST_CHARS]


@dataclass(frozen=True, kw_only=True)
class IngestOptions(Options):
    """Which raw files are worth looking at; the defaults are those of Open-Sora 2.0's report."""

    min_seconds: float = opt(2.0, "videos below are dropped", "s", least=0, most=1e6)
    min_bpp: float = opt(0.02, "bits per pixel and frame; videos below are dropped", "bits", least=0, most=1e3)
    min_fps: float = opt(16.0, "videos below are dropped", "frames/s", least=0, most=1e4)
    min_aspect: float = opt(1 / 3, "height / width; files below are dropped", least=0, most=1e4)
    max_aspect: float = opt(3.0, "height / width; files above are dropped", above=0, most=1e4)


class Ingest(Stage):
    """What a file's header says, the hash of its content, and the raw filters."""

    settings: IngestOptions

    name = "ingest"
    reads = ("path", "size", "mtime")
    adds = {
        "source_id": pl.String,
        "kind": pl.String,
        "source_seconds": pl.Float64,
        "source_fps": pl.Float64,
        "source_height": pl.Int32,
        "source_width": pl.Int32,
        "codec": pl.String,
        "profile": pl.String,
        "bpp": pl.Float64,
        "keep": pl.Boolean,
        "reason": pl.String,
    }

    def check(self) -> None:
        """Some shape is left."""
        check_order("ingest.min_aspect", self.settings.min_aspect, "ingest.max_aspect", self.settings.max_aspect)

    def worker(self) -> Worker:
        """Probe one file."""

        def probe(row: Row) -> list[Row]:
            path = Path(row["path"])
            facts = probe_video(path) if is_video(path) else probe_image(path)
            reason = raw_reason(facts, self.settings)
            return [{**facts, "source_id": hash_file(path), "keep": not reason, "reason": reason}]

        return probe

    def finish(self, table: pl.DataFrame) -> pl.DataFrame:
        """Of files with the same content only the first stays in, or the first with a caption."""
        bare = pl.col("text").is_null() | (pl.col("text") == "") if "text" in table.columns else pl.lit(False)
        table = table.with_columns((pl.int_range(pl.len()) + pl.when(bare).then(pl.len()).otherwise(0)).alias("_place"))
        later = pl.col("_place") > pl.col("_place").min().over("source_id")
        again = pl.col("source_id").is_not_null() & later & pl.col("keep")
        table = table.with_columns(
            pl.when(again).then(pl.lit("same file")).otherwise(pl.col("reason")).alias("reason"),
            (pl.col("keep") & ~again).alias("keep"),
        )
        return table.drop("_place")


def probe_image(path: Path) -> Row:
    """Size of a picture."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise UserError(f"empty file (0 bytes): {path.name}")
    height, width = read_image(path).shape[:2]
    facts: dict[str, Any] = dict.fromkeys(("source_seconds", "source_fps", "codec", "profile", "bpp"))
    return {**facts, "kind": "image", "source_height": height, "source_width": width}


def probe_video(path: Path) -> Row:
    """Length, rate, size (upright, square pixels), codec and bits per pixel of a video.

    The first frame is decoded, since only it tells how a phone was held. The rate is the average one, which is all
    that a variable rate has.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        fps = frame_rate(stream)
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / 1e6
        else:  # raw streams have no length in their header
            seconds = sum(1 for packet in container.demux(stream) if packet.size) / max(fps, 1e-9)
            container.seek(0)
        bytes_, codec, profile = path.stat().st_size, stream.codec_context.name, stream.codec_context.profile
        bits = stream.bit_rate * seconds if stream.bit_rate else bytes_ * 8
        _, frame = next(decode(container, path.name))
        height, width = display_size(frame, stream)
    if fps <= 0 or seconds <= 0:
        raise UserError(f"{path.name} says neither its length nor its frame rate")
    return {
        "kind": "video",
        "source_seconds": seconds,
        "source_fps": fps,
        "source_height": height,
        "source_width": width,
        "codec": codec,
        "profile": profile,
        "bpp": bits / (seconds * fps * height * width),
    }


def display_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(height, width) as shown: square pixels, upright."""
    ratio = float(stream.sample_aspect_ratio or 1) or 1.0
    size = (frame.height, round(frame.width * ratio))
    return size if turns(frame) % 2 == 0 else (size[1], size[0])


def raw_reason(facts: Row, settings: IngestOptions) -> str:
    """Why a raw file is dropped, empty if it is not."""
    aspect = facts["source_height"] / facts["source_width"]
    if aspect < settings.min_aspect:
        return "too wide"
    if aspect > settings.max_aspect:
        return "too tall"
    if facts["kind"] == "image":
        return ""
    if facts["source_seconds"] < settings.min_seconds:
        return "too short"
    if facts["source_fps"] < settings.min_fps:
        return "frame rate too low"
    if facts["bpp"] < settings.min_bpp:
        return "bit rate too low"
    return ""
