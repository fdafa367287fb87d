"""Latent statistics per channel, to paste into a config: ``python scripts/vae/stats.py CONFIG [--key value ...]``."""

import logging
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.config import parse_config, run_main
from opensora.config.commands import VaeStatsOptions
from opensora.datasets.dataloader import build_train_loader
from opensora.evaluation.clips import SIZE_MULTIPLE, bucket_of
from opensora.evaluation.latents import RunningMoments
from opensora.models.build import build_on_meta, build_ready, check_weights
from opensora.registry import DATASETS, build_module
from opensora.training.checks import check_frames
from opensora.utils.errors import UserError, check_least
from opensora.utils.logging import setup_logging


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Encode the dataset and print what brings its latents to unit variance, in the terms of the autoencoder."""
    cfg = parse_config(argv, VaeStatsOptions)
    setup_logging(level=logging.INFO if cfg.verbose else logging.WARNING)
    for key in ("model", "dataset"):
        if not cfg.get(key):
            raise UserError(f"{cfg.config_path}: '{key}' is missing")
    check_least(cfg, {"max_batches": 1, "num_workers": 0})
    device, dtype = pick_device(cfg.device), torch_dtype(cfg.dtype)
    check_weights("model", cfg.model)
    buckets = bucket_of(cfg.eval_setting) if cfg.eval_setting else cfg.bucket_config
    autoencoder: Any = build_on_meta(cfg.model)
    check_frames(buckets or {}, autoencoder)
    dataset = build_module(dict(cfg.dataset), DATASETS, require_text=False)
    section = dict(cfg.model)
    if section["type"] == "dc_ae":
        section["scaling_factor"] = None  # the latents as they are before scaling
    loader, _ = build_train_loader(
        dataset,
        buckets,
        multiple=max(SIZE_MULTIPLE, *autoencoder.compression[1:]),
        seed=cfg.seed,
        num_workers=cfg.num_workers,
        prefetch_factor=cfg.prefetch_factor,
    )
    model: Any = build_ready(section, device, dtype)
    torch.manual_seed(cfg.seed)  # of the posterior's noise, which a diffusion model is trained with as well
    moments = RunningMoments()
    batches = min(len(loader), cfg.max_batches or len(loader))
    for batch in tqdm(islice(loader, batches), total=batches, unit="batch", disable=cfg.verbose == 0):
        z = model.encode(batch["video"].to(device, dtype))
        moments.add(model.denormalize(z) if hasattr(model, "denormalize") else z)
    print(f"mean = {listed(moments.mean)}\nstd = {listed(moments.std)}")
    mean, std = moments.overall
    if section["type"] == "dc_ae":  # divides latents by one number for all channels
        print(f"scaling_factor={std:.4f},")
    elif section["type"] == "autoencoder_2d":  # one number for all channels
        print(f"scale_factor={1 / std:.4f},\nshift_factor={mean:.4f},")
    else:
        print(f"scale_factor={listed(1 / moments.std)},\nshift_factor={listed(moments.mean)},")


def listed(values: torch.Tensor) -> str:
    """Numbers as a config has them."""
    return "[" + ", ".join(f"{value:.4f}" for value in values.tolist()) + "]"


if __name__ == "__main__":
    run_main(main)
