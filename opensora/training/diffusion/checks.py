"""Everything about a diffusion training config that can be wrong, found before any model is built."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.acceleration.devices import torch_dtype
from opensora.config.options import OptimOptions
from opensora.datasets.buckets import BucketTable
from opensora.diffusion.conditions import CONDITIONS
from opensora.models.autoencoder import Autoencoder, check_buckets
from opensora.models.build import MAX_CPU_PARAMETERS, build_on_meta, check_weights, count_parameters
from opensora.models.mmdit.loading import explain_mismatch, layout_metadata
from opensora.registry import MODELS, build_module
from opensora.training.checks import check_loop
from opensora.training.diffusion.encoders import encoders_to_load
from opensora.training.diffusion.inputs import InputOptions
from opensora.training.diffusion.samples import sampling_config
from opensora.training.diffusion.validation import check_validation
from opensora.training.report.trackers import check_trackers
from opensora.training.weights.adapters import LoraAdapter, freeze, read_adapter
from opensora.utils.errors import UserError
from opensora.utils.weights import open_weights
from opensora.utils.weights_loading import check_match

SECTIONS = ("model", "ae", "t5", "clip", "dataset", "bucket_config", "optim")
WIDTH_KEYS = {"t5": ("context_in_dim", "d_model"), "clip": ("vec_in_dim", "hidden_size")}


def check_config(cfg: Any) -> InputOptions:
    """Check a resolved training config (``TrainOptions``), except for its table and its checkpoint.

    Returns:
        The numbers of the training objective.

    Raises:
        UserError: names the key and what would be right.
    """
    for key in SECTIONS:
        section = cfg[key]
        if not section or (isinstance(section, OptimOptions) and not section.given):
            raise UserError(f"{cfg.config_path}: '{key}' is missing; training needs {', '.join(SECTIONS)}")
    _check_numbers(cfg)
    _check_conditions(cfg)
    model: Any = build_on_meta(cfg.model)
    ae = build_module({**cfg.ae, "from_pretrained": None}, MODELS, device_map="meta")
    _check_sizes(cfg, model, ae)
    check_buckets(cfg.bucket_config, ae)
    multiple = ae.compression[1] * cfg.patch_size
    BucketTable(cfg.bucket_config, multiple)
    _check_trained(cfg, model)
    check_trackers(cfg)
    dropout = cfg.dropout_ratio or {}
    return InputOptions(
        patch_size=cfg.patch_size,
        spatial_multiple=multiple,
        sigma_min=cfg.sigma_min,
        guidance=cfg.guidance,
        no_i2v_ref_loss=cfg.no_i2v_ref_loss,
        t5_dropout=dropout.get("t5", 0.0),
        clip_dropout=dropout.get("clip", 0.0),
        condition_weights=dict(cfg.condition_config) if cfg.condition_config else None,
    )


def _check_numbers(cfg: Any) -> None:
    check_loop(cfg)
    if torch_dtype(cfg.dtype) == torch.float16:
        raise UserError(f"dtype={cfg.dtype}: training works in bf16 (with fp32 master weights) or fp32")


def _check_conditions(cfg: Any) -> None:
    weights = cfg.condition_config
    for name in weights or {}:
        if name not in CONDITIONS:
            raise UserError(f"condition_config: unknown condition {name!r}; valid: {', '.join(CONDITIONS)}")
    if bool(weights) != bool(cfg.model.get("cond_embed", False)):
        raise UserError(
            "condition_config and model.cond_embed belong together: set both (image conditions) or neither (text only)"
        )


def _check_sizes(cfg: Any, model: Any, ae: Autoencoder) -> None:
    """Channels, patches and text widths of the sections against each other."""
    patch, channels = cfg.patch_size, ae.latent_channels
    expected = channels * patch**2
    if model.config.in_channels != expected:
        raise UserError(
            f"model.in_channels={model.config.in_channels} does not fit: {channels} latent channels in patches of "
            f"{patch}x{patch} make {expected}"
        )
    if model.config.cond_embed and model.config.patch_size != patch:
        raise UserError(f"patch_size={patch} and model.patch_size={model.config.patch_size} must be equal")
    for section, (key, width_key) in WIDTH_KEYS.items():
        file = Path(str(cfg[section].get("from_pretrained"))) / "config.json"
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        width = content.get("text_config", content).get(width_key)
        if width is not None and width != getattr(model.config, key):
            raise UserError(
                f"model.{key}={getattr(model.config, key)}, but the embeddings of {section} ({file.parent}) have width "
                f"{width}: set model.{key}={width}"
            )


def _check_trained(cfg: Any, model: nn.Module) -> None:
    """What is trained: LoRA, frozen parts. Changes ``model``, which is on the meta device."""
    if cfg.lora_checkpoint and not cfg.lora_config:
        raise UserError("lora_checkpoint is set without lora_config: give both, to train an adapter")
    if not cfg.lora_config:
        freeze(model, cfg.freeze_layers)
        return
    if cfg.freeze_layers:
        raise UserError("freeze_layers and lora_config: an adapter leaves all of the model's weights frozen; set one")
    if not cfg.model.get("from_pretrained"):
        raise UserError("lora_config: an adapter needs a trained model; give its weights with --model.from_pretrained")
    LoraAdapter(model, cfg.lora_config)
    if cfg.lora_checkpoint:
        read_adapter(cfg.lora_checkpoint)


def check_resources(cfg: Any, device: torch.device, resume: Path | None) -> None:
    """See that weights are there, readable and of this architecture, and that the device is up to the model.

    Raises:
        UserError: says what to download, which key to change, or what to use instead.
    """
    model = build_on_meta(cfg.model)
    if device.type == "cpu" and cfg.device is None:
        parameters = count_parameters(model)
        if parameters > MAX_CPU_PARAMETERS:
            raise UserError(
                f"no GPU found, and this config's model has {parameters / 1e9:.1f}B parameters; use "
                "configs/diffusion/train/demo_cpu.py for a model that trains on a CPU, or --device cpu to insist"
            )
    for name in encoders_to_load(cfg):
        check_weights(name, cfg[name])
    if resume is not None and not cfg.lora_config:
        if not (resume / "model").is_dir():
            raise UserError(f"--load {resume}: it holds an adapter, not a model; set lora_config as in its config.txt")
        check_architecture(model, resume / "model" / "model.safetensors", strict=True)
    elif cfg.model.get("from_pretrained"):
        check_weights("model", cfg.model)
        if Path(cfg.model["from_pretrained"]).expanduser().exists():
            check_architecture(model, Path(cfg.model["from_pretrained"]), bool(cfg.model.get("strict_load", True)))
    if resume is not None and cfg.lora_config:
        read_adapter(resume / "lora")
    check_validation(cfg)
    if cfg.samples:
        sampling_config(cfg)


def check_architecture(model: Any, path: Path, strict: bool) -> None:
    """Compare weights on disk with a model on the meta device, before either is loaded.

    Raises:
        UserError: names the config keys that differ.
    """
    check_match(
        model,
        open_weights(path),
        explain=partial(explain_mismatch, model.config, strict=strict),
        metadata=layout_metadata(model.config),
        allow_missing=() if strict else ("cond_in.",),
        allow_unexpected=() if strict else ("cond_in.", "guidance_in."),
    )
