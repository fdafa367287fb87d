"""The frozen encoders that a diffusion training run needs, and what stands in for those whose outputs are cached."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.config.commands import TrainOptions
from opensora.datasets.source import ClipSource
from opensora.encoded.config import TrajectoriesConfig
from opensora.encoded.dataset import CachedVideoTextDataset
from opensora.encoded.trajectories import TrajectoryDataset
from opensora.models.autoencoder import Autoencoder, as_autoencoder
from opensora.registry import MODELS, build_module


def cache_folder(cfg: TrainOptions) -> str | None:
    """The config's ``cache_dir``, or that of its ``dataset``."""
    return cfg.cache_dir or getattr(cfg.dataset, "cache_dir", None)


def meta_autoencoder(cfg: TrainOptions) -> Autoencoder:
    """The autoencoder without weights: enough to know its sizes and to scale latents."""
    return as_autoencoder(build_module(cfg.ae, MODELS, from_pretrained=None, device_map="meta"))


class EmptyText:
    """Stands for a text encoder where texts are cached: knows the embedding of the empty text only."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``embedding`` as a batch of one; any other text is a mistake of the caller's."""
        assert list(texts) == [""], "texts are cached, no text encoder is loaded"
        return self.embedding[None]


def encoders_to_load(cfg: TrainOptions) -> list[str]:
    """Sections of the encoders that a run needs, cached or not: those whose output is not cached, all of them where
    held-out rows or sample videos need them too, and those that single files (see ``cached_video_text``) leave open."""
    if cfg.validation or cfg.samples:
        return ["ae", "t5", "clip"]
    if isinstance(cfg.dataset, TrajectoriesConfig):  # which holds all that they make
        return []
    whole = bool(cache_folder(cfg))
    video = cfg.cached_video and (whole or not cfg.condition_config)
    text = cfg.cached_text and whole  # single files do not hold the empty text
    return [*([] if video else ["ae"]), *([] if text else ["t5", "clip"])]


def cached_encoders(
    cfg: TrainOptions,
    dataset: ClipSource,
    device: torch.device,
    dtype: torch.dtype,
    ae: Autoencoder | None = None,
) -> dict[str, Any]:
    """Stand-ins for the encoders that are not among :func:`encoders_to_load`, by section.

    Args:
        ae: the autoencoder without weights, which knows its sizes and scales latents: stands in for itself; built, if
            it is not given. The text encoders that stand in know the empty text.
    """
    loaded = encoders_to_load(cfg)
    found: dict[str, Any] = {}
    if "ae" not in loaded:
        found["ae"] = meta_autoencoder(cfg) if ae is None else ae
    if "t5" not in loaded:
        if isinstance(dataset, TrajectoryDataset):
            empty = dataset.empty_text()
        else:
            assert isinstance(dataset, CachedVideoTextDataset)
            assert dataset.cache is not None
            empty = dataset.cache.empty_text()
        found["t5"] = EmptyText(empty["text_t5"].to(device, dtype))
        found["clip"] = EmptyText(empty["text_clip"].to(device, dtype))
    return found
