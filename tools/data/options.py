"""Every key of a data config: ``configs/data/*.py`` and the command lines of ``tools/data``.

``least``, ``above`` and ``most`` bound a number: at least, more than, at most (``tools.data.limits``).
"""

# ruff: noqa: RUF009 - opt() and section() make dataclass fields

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opensora.config.options import Options, opt, section

Bounds = dict[str, list[Any]]
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]
SMALLEST_SIDE = 16  # px; below, there is nothing to be seen, and optical flow fails


def _fill(group: type, help: str) -> Any:
    return section(group, help, default={}, fill=True)


@dataclass(frozen=True, kw_only=True)
class IngestOptions(Options):
    """Which raw files are worth looking at; the defaults are those of Open-Sora 2.0's report."""

    min_seconds: float = opt(2.0, "videos below are dropped", "s", least=0)
    min_bpp: float = opt(0.02, "bits per pixel and frame; videos below are dropped", "bits", least=0)
    min_fps: float = opt(16.0, "videos below are dropped", "frames/s", least=0)
    min_aspect: float = opt(1 / 3, "height / width; files below are dropped", least=0)
    max_aspect: float = opt(3.0, "height / width; files above are dropped", above=0)


@dataclass(frozen=True, kw_only=True)
class ScenesOptions(Options):
    """Where one shot ends and the next begins."""

    method: Literal["scdet", "adaptive", "transnetv2"] = opt(
        "scdet", "FFmpeg's scdet, PySceneDetect's adaptive detector, or TransNetV2 (finds dissolves)"
    )
    threshold: float | None = opt(None, "of the method; none takes 10 (scdet), 3 (adaptive), 0.5 (transnetv2)", above=0)
    min_frames: int = opt(3, "shots below are joined to the one before", "frames", least=1)


@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    """What a clip looks like."""

    min_seconds: float = opt(2.0, "shots below give no clip", "s", least=0)
    max_seconds: float = opt(8.0, "longer shots give several clips", "s", above=0)
    max_side: int = opt(1080, "long side; larger ones are shrunk", "px", least=SMALLEST_SIDE)
    max_fps: float = opt(30.0, "higher rates are thinned out by a whole number", "frames/s", least=1)
    remove_borders: bool = opt(True, "cut off black borders")
    border_level: int = opt(24, "brightness up to which a row or column is black", "0..255", least=0, most=255)
    crf: int = opt(18, "x264 quality: 0 lossless, 51 worst", least=0, most=51)
    preset: Preset = opt("veryfast", "x264 speed")


@dataclass(frozen=True, kw_only=True)
class MotionOptions(Options):
    """The VMAF motion feature, which training appends as 'motion score'."""

    fps: float = opt(24.0, "frames are compared at this rate", "frames/s", above=0)


@dataclass(frozen=True, kw_only=True)
class FlowOptions(Options):
    """Optical flow (DIS)."""

    pairs_per_second: float = opt(2.0, "pairs of neighbouring frames looked at", above=0)
    side: int = opt(320, "long side for the flow; that of camera costs least", "px", least=SMALLEST_SIDE)


@dataclass(frozen=True, kw_only=True)
class CameraOptions(Options):
    """Camera motion from tracked points."""

    fps: float = opt(10.0, "frames are compared at this rate", "frames/s", above=0)
    side: int = opt(320, "long side for the tracking", "px", least=SMALLEST_SIDE)
    points: int = opt(80, "points tracked at most", least=8)
    pan: float = opt(0.03, "speed from which it is a pan or tilt", "frame widths/s", above=0)
    zoom: float = opt(0.03, "change of scale from which it is a zoom", "1/s", above=0)
    shake: float = opt(0.004, "deviation from smooth motion from which it is shake", "frame widths", above=0)


@dataclass(frozen=True, kw_only=True)
class BlurOptions(Options):
    """Sharpness: energy of the Laplacian against contrast."""

    frames: int = opt(5, "frames looked at", least=1)
    side: int = opt(720, "long side it is measured at", "px", least=SMALLEST_SIDE)


@dataclass(frozen=True, kw_only=True)
class FramesOptions(Options):
    """Pictures taken out of a clip for the stages after."""

    count: int = opt(3, "frames per clip, at the middle of equal parts", least=1)
    side: int = opt(720, "long side", "px", least=SMALLEST_SIDE)
    quality: int = opt(92, "of the JPEG", least=1, most=100)


@dataclass(frozen=True, kw_only=True)
class OcrOptions(Options):
    """Share of the picture covered by readable text (RapidOCR)."""

    min_score: float = opt(0.6, "confidence from which text counts as recognised", least=0, most=1)
    min_chars: int = opt(2, "shorter finds do not count", least=1)


@dataclass(frozen=True, kw_only=True)
class ClipOptions(Options):
    """Features of the pictures, for aesthetic, match and duplicates."""

    path: str | None = opt(None, "folder of a CLIP model; the scores of others are of openai/clip-vit-large-patch14")
    device: str = opt("cpu", "cpu or cuda")


@dataclass(frozen=True, kw_only=True)
class AestheticOptions(Options):
    """Aesthetic score: CLIP features through a small head."""

    head: str | None = opt(None, "weights of the head (sac+logos+ava1-l14-linearMSE.pth)")


@dataclass(frozen=True, kw_only=True)
class MatchOptions(Options):
    """How well caption and picture match: 100 x cosine of CLIP features."""

    path: str | None = opt(None, "folder of the CLIP model that clip.path names")
    device: str = opt("cpu", "cpu or cuda")


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions(Options):
    """Clips that show the same."""

    max_distance: float = opt(
        6.0, "mean distance of perceptual hashes up to which clips are the same", "bits of 64", least=0, most=64
    )
    min_cosine: float = opt(
        0.98, "cosine of CLIP features from which they are, where the chain has stage clip", least=-1, most=1
    )


@dataclass(frozen=True, kw_only=True)
class FilterOptions(Options):
    """Named sets of thresholds, from lenient to strict."""

    tiers: dict[str, Bounds] = opt({}, "{tier: {column: [lowest or none, highest or none]}}")
    keep: str | None = opt(None, "tier that a clip must reach; none takes the first")


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(Options):
    """Captions by a vision-language model."""

    base_url: str | None = opt(None, "OpenAI-compatible endpoint (none: OPENAI_BASE_URL, or OpenAI's)")
    model: str = opt("gpt-4o", "its model there")
    local: str | None = opt(None, "folder or hub name of a transformers vision-language model, instead of an endpoint")
    template: str = opt("long", "short, long, motion, or your own text; {columns} of the table are filled in")
    frames: int = opt(3, "frames shown at most", least=1)
    side: int = opt(512, "their long side", "px", least=SMALLEST_SIDE)
    max_tokens: int = opt(300, "length of an answer", least=1)
    temperature: float = opt(0.01, "of sampling", least=0)
    clean: bool = opt(True, "strip markup and openings like 'The video shows'")
    concurrency: int = opt(8, "requests at a time", least=1)
    attempts: int = opt(4, "tries before a row fails", least=1)
    timeout: float = opt(60.0, "for an answer", "s", above=0)
    price_in: float = opt(0.0, "for the cost count", "per million input tokens", least=0)
    price_out: float = opt(0.0, "for the cost count", "per million output tokens", least=0)
    device: str = opt("cpu", "of a local model")


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """From raw footage to a training table."""

    aliases: ClassVar[dict[str, str]] = {}

    input: str | None = opt(None, "folder of raw footage, or a CSV/parquet table with a column path")
    output: str | None = opt(None, "folder for everything that is made")
    stages: list[str] = opt([], "stages to run, in order")
    workers: int | None = opt(None, "processes; none takes one per core, 0 works in this one", least=0)
    runner: Literal["local", "ray"] = opt("local", "where: this machine, or a Ray cluster")
    dry_run: bool = opt(False, "print what would be done")
    retry_errors: bool = opt(False, "do rows again that failed before")
    ingest: Any = _fill(IngestOptions, "raw files")
    scenes: Any = _fill(ScenesOptions, "shots")
    cut: Any = _fill(CutOptions, "clips")
    motion: Any = _fill(MotionOptions, "VMAF motion")
    flow: Any = _fill(FlowOptions, "optical flow")
    camera: Any = _fill(CameraOptions, "camera motion")
    blur: Any = _fill(BlurOptions, "sharpness")
    frames: Any = _fill(FramesOptions, "sampled frames")
    ocr: Any = _fill(OcrOptions, "readable text in the picture")
    clip: Any = _fill(ClipOptions, "picture features")
    aesthetic: Any = _fill(AestheticOptions, "aesthetic score")
    duplicates: Any = _fill(DuplicatesOptions, "duplicates")
    filter: Any = _fill(FilterOptions, "thresholds before captions")
    caption: Any = _fill(CaptionOptions, "captions")
    match: Any = _fill(MatchOptions, "caption against picture")
    final: Any = _fill(FilterOptions, "thresholds after captions")
