"""Everything about a sampling config that can be wrong, found before any weight is loaded or folder made."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opensora.acceleration.devices import torch_dtype
from opensora.acceleration.plugins import check_sizes
from opensora.diffusion.conditions import get_spans
from opensora.diffusion.lora import check_loras
from opensora.diffusion.plan import LatentSpec, SamplePlan, image_plan, make_plan
from opensora.models.autoencoder import Autoencoder, as_autoencoder
from opensora.models.build import build_on_meta, check_capacity, check_weights
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

SECTIONS = ("model", "ae", "t5", "clip")
IMAGE_SECTIONS = ("img_flux", "img_flux_ae")


def check_config(cfg: Mapping[str, Any]) -> SamplePlan:
    """Check the models, sizes and lengths of a config.

    Args:
        cfg: resolved config (:class:`opensora.config.commands.InferenceOptions`).

    Returns:
        The run that it describes.

    Raises:
        UserError: says what is wrong and what would be right.
    """
    for name, least in (("batch_size", 1), ("num_sample", 1), ("start_index", 0)):
        if cfg[name] < least:
            raise UserError(f"{name}={cfg[name]}: must be at least {least}")
    if not 0 < cfg["fps_save"] <= 1000:
        raise UserError(f"fps_save={cfg['fps_save']}: must be above 0 and at most 1000")
    torch_dtype(cfg["dtype"])
    for name in section_names(cfg):
        if not cfg[name]:
            raise UserError(f"the config has no section `{name}`")
    ae = as_autoencoder(build_on_meta(cfg["ae"]))
    model: Any = build_on_meta(cfg["model"])
    plan = make_plan(cfg["sampling_option"], LatentSpec.of(ae), cfg["patch_size"], "t2v")
    _check_channels(cfg, model, ae)
    if plan.method == "distill" and not model.config.guidance_embed:
        logger.warning("method distill: the model has no guidance_embed, so that guidance has no effect")
    if cfg["cond_type"] != "t2v" or cfg["use_t2i2v"]:
        cond_type = "i2v_head" if cfg["cond_type"] == "t2v" else cfg["cond_type"]
        if not model.config.cond_embed:
            raise UserError(f"cond_type {cond_type}: this model takes no references (model.cond_embed is False)")
        plan = make_plan(cfg["sampling_option"], LatentSpec.of(ae), cfg["patch_size"], cond_type)
    if cfg["use_t2i2v"]:
        image_plan(cfg, cfg["sampling_option"], LatentSpec.of(build_on_meta(cfg["img_flux_ae"])))
        build_on_meta(cfg["img_flux"])
    return plan


def section_names(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Config sections of the models that a run needs."""
    return SECTIONS + (IMAGE_SECTIONS if cfg["use_t2i2v"] else ())


def check_resources(cfg: Mapping[str, Any], device: torch.device) -> None:
    """See that weights are there and readable, and that the device is up to the model.

    Raises:
        UserError: says what to download or to use instead.
    """
    check_capacity(build_on_meta(cfg["model"]), device, cfg["device"])
    for name in section_names(cfg):
        check_weights(name, cfg[name])
    check_loras(cfg["pretrained_lora_path"])


def check_parallelism(cfg: Mapping[str, Any], world_size: int) -> None:
    """See that a config's parallelism suits its model and the number of processes.

    Raises:
        UserError: unknown plugins, or sizes that do not divide the model.
    """
    for key in ("plugin", "plugin_ae"):
        if cfg[key] not in (None, "none", "hybrid"):
            raise UserError(f"{key}={cfg[key]!r}: sampling knows hybrid and none")
    if cfg["plugin"] != "hybrid":
        return
    if world_size == 1:
        logger.info("one process: the parallel plugin of the config is not used")
    check_sizes(cfg["plugin_config"], build_on_meta(cfg["model"]), world_size)


def _check_channels(cfg: Mapping[str, Any], model: Any, ae: Autoencoder) -> None:
    patch = cfg["patch_size"]
    if model.config.cond_embed and model.config.patch_size != patch:
        raise UserError(f"patch_size={patch} and model.patch_size={model.config.patch_size} must be equal")
    channels = ae.latent_channels
    if model.config.in_channels != channels * patch**2:
        raise UserError(
            f"model.in_channels={model.config.in_channels} does not fit the autoencoder: {channels} latent channels "
            f"x patch {patch} x {patch} = {channels * patch**2}"
        )


def check_conditions(cfg: Mapping[str, Any], cond_types: set[str]) -> None:
    """See that the model and the length suit the conditions that a table of prompts asks for.

    Raises:
        UserError: a condition that cannot be.
    """
    ae = build_on_meta(cfg["ae"])
    for cond_type in sorted(cond_types):
        if get_spans(cond_type) and not cfg["model"].get("cond_embed"):
            raise UserError(f"cond_type {cond_type}: this model takes no references (model.cond_embed is False)")
        make_plan(cfg["sampling_option"], LatentSpec.of(ae), cfg["patch_size"], cond_type)


def check_writable(folder: str | Path) -> None:
    """See that files could be made in a folder (which need not exist yet), without making anything.

    Raises:
        UserError: no permission, or a file is in the way.
    """
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"save_dir {folder}: {path} is a file, not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"save_dir {folder}: no permission to write in {path}")
