"""Options of the datasets that read tables."""

from dataclasses import dataclass
from typing import Literal

from opensora.config.options import DatasetOptions, opt

AS_THEY_ARE = "prompts are taken as they are"


@dataclass(frozen=True, kw_only=True)
class TextConfig(DatasetOptions):
    """Table of prompts (`text`)."""

    fps_max: float = opt(16.0, "frame rate above which frames are skipped", "frames/s", above=0, no_effect=AS_THEY_ARE)
    vmaf: bool = opt(False, "append the motion score of column score_vmafmotion to texts", no_effect=AS_THEY_ARE)
    memory_efficient: bool = opt(False, "read rows from parquet shards", no_effect="tables of prompts are small")


@dataclass(frozen=True, kw_only=True)
class VideoTextConfig(DatasetOptions):
    """Table of clips or images with texts (`video_text`)."""

    fps_max: float = opt(16.0, "frame rate above which frames are skipped", "frames/s", above=0)
    vmaf: bool = opt(False, "append the motion score of column score_vmafmotion to texts")
    memory_efficient: bool = opt(False, "read rows from parquet shards instead of holding the table")
    transform_name: Literal["resize_crop", "center", "rand_size_crop"] | None = opt(None, "how frames are fitted")
    keep_in_memory: bool = opt(False, "keep decoded clips in memory; for small tables read many times")
    max_broken: float = opt(
        0.05, "share of rows that may be unreadable before the run stops (one at least)", least=0, most=1
    )
