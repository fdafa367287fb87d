"""Training on latents and text embeddings computed beforehand: the cache of a training config."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.acceleration.torchrun import Torchrun
from opensora.config.commands import CacheOptions, TrainOptions
from opensora.config.options import DatasetOptions, ModelOptions
from opensora.datasets.buckets import BucketTable
from opensora.datasets.config import VideoTextConfig
from opensora.datasets.runs import ClipPart, FrameRun
from opensora.datasets.source import ClipSource, build_source
from opensora.datasets.transforms import in_model_range
from opensora.diffusion.conditions import condition_runs
from opensora.encoded.config import CachedVideoTextConfig
from opensora.encoded.dataset import CachedVideoTextDataset, table_of
from opensora.encoded.fingerprint import describe_changes, models_fingerprint, text_fingerprint, video_fingerprint
from opensora.encoded.store import WHOLE, CacheInfo
from opensora.encoded.trajectories import TrajectoryDataset
from opensora.encoded.writer import CacheWriter, make_plan
from opensora.models.autoencoder import Autoencoder
from opensora.models.build import check_weights, count_parameters
from opensora.models.quantization.loading import tell
from opensora.models.text.fitting import count_notes
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.encoders import cache_folder, meta_autoencoder
from opensora.training.diffusion.sharing import ClipEncoder, encode_room
from opensora.utils.errors import UserError
from opensora.utils.paths import own_command

PART = re.compile(r"(\d{1,9})/(\d{1,9})")


def source_section(cfg: TrainOptions) -> DatasetOptions:
    """The config's ``dataset`` as clips and captions themselves, whatever is cached of them."""
    assert cfg.dataset is not None
    return table_of(cfg.dataset) if isinstance(cfg.dataset, VideoTextConfig) else cfg.dataset


def build_dataset(cfg: TrainOptions) -> ClipSource:
    """The config's ``dataset``, read from its cache as far as ``cached_video`` and ``cached_text`` say.

    Raises:
        UserError: a cache is asked for at the top of the config and refused in its section, or the reverse; whatever is
            wrong with the dataset or the cache.
    """
    section = cfg.dataset
    assert section is not None
    reader = section if isinstance(section, CachedVideoTextConfig) else CachedVideoTextConfig()
    for key in ("cached_video", "cached_text"):
        if getattr(reader, key) and not getattr(cfg, key):
            raise UserError(f"dataset.{key} is set, {key} is not: set both, or neither")
    if not (cfg.cached_video or cfg.cached_text):
        return build_source(section)
    config = replace(reader, cached_video=cfg.cached_video, cached_text=cfg.cached_text, cache_dir=cache_folder(cfg))
    return CachedVideoTextDataset(build_source(source_section(cfg)), config)


def check_cache(cfg: TrainOptions, dataset: ClipSource, ae: Autoencoder | None = None) -> None:
    """Refuse a cache that was not made with this config's encoders, sizes and conditions.

    Args:
        cfg: resolved config (``TrainOptions``).
        dataset: of :func:`build_dataset`; one without a cache passes.
        ae: the config's autoencoder, without weights will do; built, if it is not given.

    Raises:
        UserError: says what differs, or what is not cached, and how to rewrite the cache.
    """
    if isinstance(dataset, TrajectoryDataset):
        _check_trajectories(cfg, dataset)
    if not isinstance(dataset, CachedVideoTextDataset):
        return
    if dataset.cache is None:
        if cfg.cached_video and cfg.condition_config and not dataset.load_original_video:
            raise UserError("condition_config: single latent files hold no conditions; set dataset.load_original_video")
        return
    info = dataset.cache.info
    ae = meta_autoencoder(cfg) if ae is None else ae
    if cfg.cached_video:
        _compare(dataset, info.video or {}, _video_fingerprint(cfg, ae, must_exist=False))
        _check_runs(cfg, dataset, ae)
    if cfg.cached_text:
        _compare(dataset, info.text or {}, _text_fingerprint(cfg, must_exist=False))


def _check_trajectories(cfg: TrainOptions, dataset: TrajectoryDataset) -> None:
    """Refuse trajectories whose latents or texts other encoders made; the teacher may be any model."""
    sections: dict[str, Any] = {name: getattr(cfg, name) for name in ("ae", "t5", "clip")}
    made_with = {k: v for k, v in dataset.info.models.items() if k.partition(".")[0] in sections}
    now = {k: v for k, v in models_fingerprint(sections, torch_dtype(cfg.dtype), False).items() if k != "dtype"}
    changes = describe_changes(made_with, now)
    if changes:
        raise UserError(
            f"the trajectories in {dataset.folder} do not fit this config:\n{changes}\n"
            f"Sample them again: {dataset.info.config} --overwrite"
        )


def _video_fingerprint(cfg: TrainOptions, ae: Autoencoder, must_exist: bool = True) -> dict[str, Any]:
    assert cfg.ae is not None
    dtype, has_weights = torch_dtype(cfg.dtype), not isinstance(ae, nn.Module) or count_parameters(ae) > 0
    return video_fingerprint(cfg.ae, ae.scaling_keys, source_section(cfg), dtype, must_exist, has_weights)


def _text_fingerprint(cfg: TrainOptions, must_exist: bool = True) -> dict[str, Any]:
    assert cfg.t5 is not None
    assert cfg.clip is not None
    return text_fingerprint(cfg.t5, cfg.clip, torch_dtype(cfg.dtype), must_exist)


def _compare(dataset: CachedVideoTextDataset, made_with: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    assert dataset.cache is not None
    changes = describe_changes(made_with, now)
    if changes:
        raise UserError(
            f"the cache {dataset.cache.folder} does not fit this config:\n{changes}\n"
            f"Write it again: {dataset.cache.info.config} --overwrite"
        )


def _check_runs(cfg: TrainOptions, dataset: CachedVideoTextDataset, ae: Autoencoder) -> None:
    assert dataset.cache is not None
    if dataset.load_original_video:
        return
    frames = {int(n) for n in dataset.cache.column("num_frames") if n > 0}
    needed = {run.name for n in frames for run in condition_runs(cfg.condition_config, ae, n, cfg.window)}
    missing = sorted(needed - set(dataset.cache.info.runs))
    if missing:
        raise UserError(
            f"condition_config: the cache {dataset.cache.folder} lacks the frames {', '.join(missing)}; "
            f"write it again: {dataset.cache.info.config} --overwrite"
        )


def cache_writer(cfg: CacheOptions, processes: Torchrun | None = None) -> CacheWriter:
    """What computes the latents and text embeddings of a training config's clips.

    Args:
        cfg: resolved config (``CacheOptions``).
        processes: that divide ``cache_part`` among them; None: this one writes it all.

    Raises:
        UserError: anything wrong with config or table.
    """
    folder, parts = _check_writing(cfg)
    processes = processes or Torchrun()
    part, device = part_of(cfg.cache_part, processes), pick_device(cfg.device, processes.local_rank)
    ae = meta_autoencoder(cfg)
    clips = _clip_encoder(cfg, ae, device)
    source = build_source(source_section(cfg), keep_in_memory=False)  # each clip is read once
    plan = make_plan(source, BucketTable(cfg.bucket_config or {}, ae.compression[1] * cfg.patch_size), cfg.seed)
    runs = {n: condition_runs(cfg.condition_config, ae, n, cfg.window) for n in {key.num_frames for key in plan.keys}}
    info = CacheInfo(
        video=_video_fingerprint(cfg, ae) if "video" in parts else None,
        text=_text_fingerprint(cfg) if "text" in parts else None,
        runs=[WHOLE, *_names({run for found in runs.values() for run in found})],
        plan=plan.digest(),
        clips=len(plan.keys),
        shard_size=cfg.cache_shard_size,
        config=f"{own_command('cache', 'scripts/diffusion/cache.py')} {cfg.config_path} --cache-dir {folder}",
    )
    return CacheWriter(
        folder,
        source,
        plan,
        info,
        runs,
        partial(_load_autoencoder, cfg, device),
        partial(_load_text_encoders, cfg, device),
        overwrite=cfg.overwrite,
        wait=cfg.wait,
        num_workers=cfg.num_workers,
        batch_size=lambda size: clips.at_once(size, torch_dtype(cfg.dtype)),
        part=part,
    )


def part_of(text: str | None, processes: Torchrun) -> tuple[int, int]:
    """The part of a cache that a process writes, and how many there are.

    Args:
        text: ``cache_part``, such as 3/16; None is all of it.
        processes: that divide it among them.

    Raises:
        UserError: no such part.
    """
    found = PART.fullmatch((text or "0/1").strip())
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"cache_part={text}: give a part and their number, counted from 0: 0/16 to 15/16 of sixteen")
    number, count = int(found[1]), int(found[2])
    return number * processes.world_size + processes.rank, count * processes.world_size


def _clip_encoder(cfg: CacheOptions, ae: Autoencoder, device: torch.device) -> ClipEncoder:
    """``batch_size`` clips at a time, or as many as ``encode_memory`` allows."""
    if cfg.batch_size:
        return ClipEncoder(ae, most=cfg.batch_size)
    return ClipEncoder(ae, room=encode_room(cfg.encode_memory, device))


def _names(parts: Iterable[ClipPart]) -> list[str]:
    """Names of what is stored beside whole clips: runs of frames by end and length, then the rest."""
    runs = [part for part in parts if isinstance(part, FrameRun)]
    return [*(run.name for run in sorted(runs)), *sorted({part.name for part in parts} - {run.name for run in runs})]


def _check_writing(cfg: CacheOptions) -> tuple[Path, Sequence[str]]:
    """Folder of the cache to write, and what it is to hold: ``video``, ``text``."""
    for key in ("dataset", "bucket_config"):
        if not getattr(cfg, key):
            raise UserError(f"{cfg.config_path}: '{key}' is missing; a cache needs dataset and bucket_config")
    folder = cache_folder(cfg)
    if not folder:
        raise UserError("cache_dir is not set: say where to write, e.g. --cache-dir caches/clips")
    parts = ("video", "text") if cfg.cache_parts == "both" else (cfg.cache_parts,)
    for section in ("ae", *(("t5", "clip") if "text" in parts else ())):
        if not getattr(cfg, section):
            raise UserError(f"{cfg.config_path}: '{section}' is missing")
        check_weights(section, getattr(cfg, section))
    return Path(folder), parts


def _load(cfg: CacheOptions, section: str, device: torch.device) -> Any:
    options: ModelOptions = getattr(cfg, section)
    model = build_module(options, MODELS, device_map=str(device), torch_dtype=torch_dtype(cfg.dtype))
    tell(section, model, device)
    return model.eval().requires_grad_(False)


def _load_autoencoder(cfg: CacheOptions, device: torch.device) -> Callable[[Tensor], Tensor]:
    encode, dtype = _clip_encoder(cfg, _load(cfg, "ae", device), device), torch_dtype(cfg.dtype)
    return lambda clips: encode(in_model_range(clips.to(device)).to(dtype)).cpu()


def _load_text_encoders(
    cfg: CacheOptions, device: torch.device
) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:  # fmt: skip
    t5, clip = (_load(cfg, section, device) for section in ("t5", "clip"))
    count_notes(t5, clip)
    return lambda texts: (t5(texts).cpu(), clip(texts).cpu())
