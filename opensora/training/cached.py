"""Training on latents and text embeddings computed beforehand: what a cache must have been made with to be used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.devices import torch_dtype
from opensora.diffusion.conditions import Span, fits, get_spans
from opensora.encoded.dataset import CachedVideoTextDataset, run_name
from opensora.models.autoencoder import Autoencoder, as_autoencoder
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import files_hash

logger = get_logger(__name__)

# Keys of a section that say where its weights are, not what the encoder computes.
WHEREABOUTS = ("from_pretrained", "cache_dir", "strict_load", "shardformer")
ABSENT = "weights that are not at hand"


def plain_section(cfg: Any) -> dict[str, Any]:
    """The config's ``dataset`` as ``video_text``: clips and captions themselves, whatever is cached of them."""
    extra = ("cached_video", "cached_text", "cache_dir", "return_latents_path", "load_original_video")
    return {**{key: value for key, value in cfg.dataset.items() if key not in extra}, "type": "video_text"}


def _encoder_fingerprint(
    name: str, section: Mapping[str, Any], must_exist: bool, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    if not section.get("from_pretrained"):
        raise UserError(
            f"{name}.from_pretrained is not set: what an encoder with random weights makes is of no use later"
        )
    kept = {k: v for k, v in sorted(section.items()) if k not in (*WHEREABOUTS, *ignored) and v is not None}
    fingerprint = {f"{name}.{key}": list(v) if isinstance(v, tuple) else v for key, v in kept.items()}
    path = section["from_pretrained"]
    if not must_exist and not Path(path).expanduser().exists():
        logger.warning("%s.from_pretrained %s is not here: not compared with the weights of the cache", name, path)
        return {**fingerprint, f"{name}.from_pretrained": ABSENT}
    return {**fingerprint, f"{name}.from_pretrained": f"weights {files_hash(path, section.get('cache_dir'))}"}


def video_fingerprint(cfg: Any, must_exist: bool = True) -> dict[str, Any]:
    """What latents depend on: autoencoder and weights, precision, and the rules that choose and fit frames.

    Args:
        cfg: resolved config.
        must_exist: refuse weights that are not at hand, instead of leaving them uncompared.
    """
    rules = {
        "dataset.fps_max": float(cfg.dataset.get("fps_max", 16)),
        "dataset.transform_name": cfg.dataset.get("transform_name") or "resize_crop",
    }
    encoder = _encoder_fingerprint("ae", cfg.ae, must_exist, ignored=meta_autoencoder(cfg).scaling_keys)
    return {**encoder, **rules, "dtype": str(torch_dtype(cfg.dtype))}


def text_fingerprint(cfg: Any, must_exist: bool = True) -> dict[str, Any]:
    """What text embeddings depend on besides the text: both encoders and the precision; see
    :func:`video_fingerprint`."""
    t5, clip = (_encoder_fingerprint(name, cfg[name], must_exist) for name in ("t5", "clip"))
    return {**t5, **clip, "dtype": str(torch_dtype(cfg.dtype))}


def condition_runs(weights: Mapping[str, float] | None, ae: Autoencoder, num_frames: int) -> list[tuple[str, int]]:
    """Runs of frames, (end, pixel frames), that the conditions of a config may give in clips of this length."""
    latent_frames = ae.get_latent_size((num_frames, 64, 64))[0]
    runs = {
        (span.at, span.pixel_frames(ae.is_causal, ae.compression[0]))
        for name, weight in (weights or {}).items()
        if weight > 0 and latent_frames > 1 and fits(name, latent_frames, ae.is_causal)
        for span in get_spans(name)
    }
    return sorted(runs)


def condition_pixels(
    video: Tensor,  # [B, 3, T, H, W]
    runs: Sequence[tuple[str, int]],
) -> dict[str, Tensor]:
    """Pixels ``[B, 3, count, H, W]`` of runs of frames (see :func:`condition_runs`) by the runs' names."""
    cut = {run: Span(run[0], 0).cut for run in runs}  # type: ignore[arg-type]
    return {run_name(*run): torch.stack([cut[run](clip, run[1]) for clip in video]) for run in runs}


def meta_autoencoder(cfg: Any) -> Autoencoder:
    """The autoencoder without weights: enough to know its sizes and to scale latents."""
    return as_autoencoder(build_module({**cfg.ae, "from_pretrained": None}, MODELS, device_map="meta"))


def dataset_section(cfg: Any) -> dict[str, Any]:
    """The config's ``dataset``, as ``cached_video_text`` where ``cached_video`` or ``cached_text`` is set.

    Raises:
        UserError: a cache is asked for at the top of the config and refused in its section, or the reverse.
    """
    section = dict(cfg.dataset)
    for key in ("cached_video", "cached_text"):
        if section.get(key) and not cfg[key]:
            raise UserError(f"dataset.{key} is set, {key} is not: set both, or neither")
    if not (cfg.cached_video or cfg.cached_text):
        return section
    section.update(type="cached_video_text", cached_video=cfg.cached_video, cached_text=cfg.cached_text)
    section["cache_dir"] = cfg.cache_dir or section.get("cache_dir")
    return section


def check_cache(cfg: Any, dataset: Any) -> None:
    """Refuse a cache that was not made with this config's encoders, sizes and conditions.

    Args:
        cfg: resolved config (``TrainOptions``).
        dataset: built of :func:`dataset_section`; one without a cache passes.

    Raises:
        UserError: says what differs, or what is not cached, and how to write the cache anew.
    """
    if not isinstance(dataset, CachedVideoTextDataset):
        return
    if dataset.cache is None:
        if cfg.cached_video and cfg.condition_config and not dataset.load_original_video:
            raise UserError("condition_config: single latent files hold no conditions; set dataset.load_original_video")
        return
    info = dataset.cache.info
    if cfg.cached_video:
        _compare(dataset, info.video or {}, video_fingerprint(cfg, must_exist=False))
        _check_runs(cfg, dataset)
    if cfg.cached_text:
        _compare(dataset, info.text or {}, text_fingerprint(cfg, must_exist=False))


def _compare(dataset: CachedVideoTextDataset, made_with: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    assert dataset.cache is not None
    differing = [key for key in {**made_with, **now} if made_with.get(key) != now.get(key) and now.get(key) != ABSENT]
    if not differing:
        return
    changes = "\n".join(f"  {k}: {made_with.get(k, 'unset')} then, {now.get(k, 'unset')} now" for k in differing)
    raise UserError(
        f"the cache {dataset.cache.folder} does not fit this config:\n{changes}\n"
        f"Write it again: {dataset.cache.info.config} --overwrite"
    )


def _check_runs(cfg: Any, dataset: CachedVideoTextDataset) -> None:
    assert dataset.cache is not None
    if dataset.load_original_video:
        return
    ae = meta_autoencoder(cfg)
    frames = {int(n) for n in dataset.cache.column("num_frames") if n > 0}
    needed = {run_name(*run) for n in frames for run in condition_runs(cfg.condition_config, ae, n)}
    missing = sorted(needed - set(dataset.cache.info.runs))
    if missing:
        raise UserError(
            f"condition_config: the cache {dataset.cache.folder} lacks the frames {', '.join(missing)}; "
            f"write it again: {dataset.cache.info.config} --overwrite"
        )


class EmptyText:
    """Stands for a text encoder where texts are cached: knows the embedding of the empty text only."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``embedding`` as a batch of one; any other text is a mistake of the caller's."""
        assert list(texts) == [""], "texts are cached, no text encoder is loaded"
        return self.embedding[None]


def encoders_to_load(cfg: Any) -> list[str]:
    """Sections of the encoders that a run needs, cached or not: those whose output is not cached, all of them where
    held-out rows or sample videos need them too, and those that single files (see ``cached_video_text``) leave open."""
    if cfg.validation or cfg.samples:
        return ["ae", "t5", "clip"]
    whole = bool(dataset_section(cfg).get("cache_dir"))
    video = cfg.cached_video and (whole or not cfg.condition_config)
    text = cfg.cached_text and whole  # single files do not hold the empty text
    return [*([] if video else ["ae"]), *([] if text else ["t5", "clip"])]


def cached_encoders(cfg: Any, dataset: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Stand-ins for the encoders that are not among :func:`encoders_to_load`, by section.

    The autoencoder that stands in has no weights: it knows its sizes and scales latents. The text encoders know the
    empty text.
    """
    loaded = encoders_to_load(cfg)
    found: dict[str, Any] = {}
    if "ae" not in loaded:
        found["ae"] = meta_autoencoder(cfg)
    if "t5" not in loaded:
        assert isinstance(dataset, CachedVideoTextDataset)
        assert dataset.cache is not None
        empty = dataset.cache.empty_text()
        found["t5"] = EmptyText(empty["text_t5"].to(device, dtype))
        found["clip"] = EmptyText(empty["text_clip"].to(device, dtype))
    return found


def describe_command(cfg: Any, folder: Path) -> str:
    """Command line that writes the cache of a config."""
    return f"python scripts/diffusion/cache.py {cfg.config_path} --cache-dir {folder}"
