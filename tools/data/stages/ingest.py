"""Find raw files, look into their headers, drop unusable ones."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError
from opensora.utils.media.kinds import video_stream
from opensora.utils.media.probe import probe
from tools.data.engine.decode import check_file, open_video
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
    version = 2
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
            facts = probe_file(path)
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


def probe_file(path: Path) -> Row:
    """What a picture or clip is, by its content: size as shown (upright, square pixels); of a clip also length, rate
    (the mean where it varies), codec and bits per pixel.

    Raises:
        UserError: missing, empty, or neither a picture nor a clip.
    """
    check_file(path)
    try:
        info = probe(path)
    except UserError as error:  # whose message is shown beside the path
        raise UserError(str(error).replace(str(path), path.name)) from error
    size: Row = {"source_height": info.height, "source_width": info.width}
    if info.kind == "picture":
        return {**dict.fromkeys(("source_seconds", "source_fps", "codec", "profile", "bpp")), **size, "kind": "image"}
    seconds = info.num_frames / info.fps
    with open_video(path) as container:
        stream = video_stream(container)
        bits = stream.bit_rate * seconds if stream.bit_rate else path.stat().st_size * 8
        profile = stream.codec_context.profile
    return {
        **size,
        "kind": "video",
        "source_seconds": seconds,
        "source_fps": info.fps,
        "codec": info.codec,
        "profile": profile,
        "bpp": bits / (info.num_frames * info.height * info.width),
    }


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
