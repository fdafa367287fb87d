"""What stored latents and embeddings depend on, so that a cache made with something else is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.config.options import DatasetOptions, ModelOptions
from opensora.datasets.config import VideoTextConfig
from opensora.utils import hub
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import files_hash

logger = get_logger(__name__)

# Keys of a section that say where its weights are, not what the encoder computes.
WHEREABOUTS = ("from_pretrained", "cache_dir", "strict_load", "shardformer")
# Keys of a dataset that change none of its clips.
HANDLING = ("data_path", "max_broken", "keep_in_memory", "memory_efficient", "require_text")
ABSENT = "weights that are not at hand"


def _encoder_fingerprint(
    name: str, section: ModelOptions, must_exist: bool, ignored: Sequence[str] = (), has_weights: bool = True
) -> dict[str, Any]:
    path = section.from_pretrained
    kept = {k: v for k, v in sorted(section.to_dict().items()) if k not in (*WHEREABOUTS, *ignored) and v is not None}
    fingerprint = {f"{name}.{key}": list(v) if isinstance(v, tuple) else v for key, v in kept.items()}
    if not has_weights:
        return fingerprint
    if not path:
        raise UserError(
            f"{name}.from_pretrained is not set: what an encoder with random weights makes is of no use later"
        )
    if not must_exist and not Path(path).expanduser().exists():
        logger.warning("%s.from_pretrained %s is not here: not compared with the weights of the cache", name, path)
        return {**fingerprint, f"{name}.from_pretrained": ABSENT}
    return {**fingerprint, f"{name}.from_pretrained": f"weights {_weights(section, path)}"}


def _weights(section: ModelOptions, path: str) -> str:
    """What identifies weights: their content; of a text encoder that a hub id names the commit, since its library takes
    some files only."""
    if section.type != "text_embedder" or not hub.is_repo(path):
        return files_hash(path, section.cache_dir)
    folder = hub.local_model(path)
    return files_hash(folder) if folder != path else f"{path}@{hub.commit(path, section.cache_dir)}"


def source_fingerprint(section: DatasetOptions) -> dict[str, Any]:
    """The rules by which a dataset chooses and fits frames.

    Args:
        section: ``type`` and arguments of the clips' dataset. Of one of the user's own, all that might matter counts.
    """
    if isinstance(section, VideoTextConfig):
        return {
            "dataset.fps_max": section.fps_max,
            "dataset.transform_name": section.transform_name or "resize_crop",
        }
    rules = {f"dataset.{key}": value for key, value in sorted(section.to_dict().items()) if key not in HANDLING}
    return json.loads(json.dumps(rules, default=str))  # as it will be read from cache.json


def video_fingerprint(
    ae: ModelOptions,
    scaling_keys: Sequence[str],
    source: DatasetOptions,
    dtype: torch.dtype,
    must_exist: bool = True,
    has_weights: bool = True,
) -> dict[str, Any]:
    """What latents depend on: autoencoder and weights, precision, and the rules that choose and fit frames.

    Args:
        ae: section of the autoencoder.
        scaling_keys: those of its keys that change nothing of what is stored.
        source: section of the clips' dataset.
        dtype: precision that clips are encoded in.
        must_exist: refuse weights that are not at hand, instead of leaving them uncompared.
        has_weights: whether the autoencoder has any.
    """
    encoder = _encoder_fingerprint("ae", ae, must_exist, scaling_keys, has_weights)
    return {**encoder, **source_fingerprint(source), "dtype": str(dtype)}


def text_fingerprint(
    t5: ModelOptions, clip: ModelOptions, dtype: torch.dtype, must_exist: bool = True
) -> dict[str, Any]:
    """What text embeddings depend on besides the text: both encoders and the precision; see
    :func:`video_fingerprint`."""
    encoders = [_encoder_fingerprint(name, section, must_exist) for name, section in (("t5", t5), ("clip", clip))]
    return {**encoders[0], **encoders[1], "dtype": str(dtype)}


def models_fingerprint(
    sections: Mapping[str, ModelOptions], dtype: torch.dtype, must_exist: bool = True
) -> dict[str, Any]:
    """What samples of a diffusion model depend on: the models by section, with their weights, and the precision."""
    parts = [_encoder_fingerprint(name, section, must_exist) for name, section in sections.items()]
    return {**{key: value for part in parts for key, value in part.items()}, "dtype": str(dtype)}


def describe_changes(made_with: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A line per key in which two fingerprints differ; weights that are not at hand are not compared."""
    differing = [key for key in {**made_with, **now} if made_with.get(key) != now.get(key) and now.get(key) != ABSENT]
    return "\n".join(f"  {k}: {made_with.get(k, 'unset')} then, {now.get(k, 'unset')} now" for k in differing)
