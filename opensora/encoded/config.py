"""Options of the datasets that read what was computed beforehand."""

from dataclasses import dataclass

from opensora.config.options import DatasetOptions, opt
from opensora.datasets.config import VideoTextConfig


@dataclass(frozen=True, kw_only=True)
class CachedVideoTextConfig(VideoTextConfig):
    """Table of clips with stored latents and text embeddings (`cached_video_text`)."""

    cached_video: bool = opt(False, "read latents from cache_dir, or of column latents_path")
    cached_text: bool = opt(False, "read embeddings from cache_dir, or of columns text_t5_path and text_clip_path")
    cache_dir: str | None = opt(None, "folder that scripts/diffusion/cache.py wrote")
    return_latents_path: bool = opt(False, "samples name their latent file")
    load_original_video: bool | None = opt(None, "read the clip too; none does where its latents are not cached")


@dataclass(frozen=True, kw_only=True)
class TrajectoriesConfig(DatasetOptions):
    """Trajectories of a teacher: a folder that scripts/diffusion/trajectories.py wrote (`trajectories`)."""
