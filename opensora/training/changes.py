"""Whether a resumed run is still the same: what decides its result, against the config of its checkpoint."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora.config.commands import LoopOptions
from opensora.config.options import Options, default_of
from opensora.utils.errors import UserError, shorten
from opensora.utils.paths import expand_home, read_text

# Keys that decide what a run learns; others say where and how fast, for how long, or what is logged and saved.
DECIDING = (
    *("dtype", "seed", "dataset", "bucket_config", "model", "ae", "t5", "clip", "optim", "freeze_layers"),
    *("training_method", "training_method_config", "patch_size", "condition_config", "window", "dropout_ratio"),
    *("guidance", "sigma_min", "no_i2v_ref_loss", "lora_config", "warmup_steps", "use_cosine_scheduler", "flat_share"),
    *("vae_loss_config", "discriminator", "gen_loss_config", "disc_loss_config", "optim_discriminator", "lr_scheduler"),
    *("time_sampling", "loss_weighting", "lr_schedule", "lr_decay_share", "lr_final_share"),
    *("disc_lr_scheduler", "mixed_strategy", "mixed_image_ratio", "image_steps", "image_bucket_config", "image_lr"),
)
# Keys of their sections that decide nothing.
ASIDE = (
    *("cache_dir", "cached_video", "cached_text", "keep_in_memory", "memory_efficient", "max_broken", "strict_load"),
    *("grad_ckpt_settings", "attn_backend", "norm_backend", "rope_backend", "shardformer", "load_original_video"),
    *("states", "in_backward"),
)
START = ("model.from_pretrained", "discriminator.from_pretrained")  # a resumed run has its own weights


def check_unchanged(cfg: LoopOptions, checkpoint: Path, asked: str) -> None:
    """See that a config trains what its checkpoint was trained with, as far as that can be told.

    Args:
        cfg: resolved config.
        checkpoint: to resume from; ``config.txt`` beside it is its run's.
        asked: flag that chose it, for messages.

    Raises:
        UserError: names the keys that differ, with their values.
    """
    try:
        before = json.loads(read_text(checkpoint.parent / "config.txt"))
    except (OSError, ValueError):
        return  # moved here, or of another program
    if cfg.load_changed or not isinstance(before, dict):
        return
    changes = [f"{key} was {_short(old)}, is {_short(new)}" for key, old, new in _changes(cfg, before, "")]
    if changes:
        raise UserError(
            f"{asked}: {checkpoint} was trained with other settings: {shorten(changes)}. --load-changed True resumes "
            "anyway; --load PATH resumes from another one"
        )


def _changes(section: Options, before: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of what differs."""
    own_type = getattr(section, "type", None)
    if own_type != before.get("type") and prefix != "dataset.":  # which may read a cache of the same table
        yield f"{prefix}type", before.get("type"), own_type
    for key in dataclasses.fields(section):
        name = prefix + key.name
        if not key.metadata or key.name in ASIDE or name in START or (not prefix and key.name not in DECIDING):
            continue
        now, default = getattr(section, key.name), default_of(key)
        old = before.get(key.name, _plain(default))
        if isinstance(now, Options) and isinstance(old, Mapping):
            yield from _changes(now, old, f"{name}.")
        elif _plain(now) != old and not _same_place(now, old):
            yield name, old, _plain(now)


def _plain(value: Any) -> Any:
    """As it stands in ``config.txt``."""
    return json.loads(json.dumps(value.to_dict() if isinstance(value, Options) else value, default=str))


def _same_place(one: Any, other: Any) -> bool:
    texts = isinstance(one, str) and isinstance(other, str)
    return texts and expand_home(one).resolve() == expand_home(other).resolve()


def _short(value: Any, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
