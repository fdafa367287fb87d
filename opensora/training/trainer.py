"""Training of the diffusion model."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.engine import SingleEngine
from opensora.datasets.dataloader import build_train_loader, endless, to_device
from opensora.diffusion.building import pick_device, torch_dtype
from opensora.diffusion.conditions import CONDITIONS
from opensora.models.mmdit.loading import layout_metadata
from opensora.registry import DATASETS, MODELS, build_module
from opensora.training.checkpoint import RunningStates, find_checkpoint, load_part, load_states, load_weights
from opensora.training.checks import check_frames, check_unfinished
from opensora.training.ema import EMA
from opensora.training.experiment import create_experiment
from opensora.training.inputs import InputEncoder, InputOptions, diffusion_loss
from opensora.training.loop import LoopSettings, TrainLoop
from opensora.training.metrics import MetricLog
from opensora.training.optimizer import create_optimizer, create_schedule
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

SECTIONS = ("model", "ae", "t5", "clip", "dataset", "bucket_config", "optim")


def check_config(cfg: Any) -> InputOptions:
    """Everything about a diffusion training config that can be judged before models are built.

    Raises:
        UserError: names the key and what would be right.
    """
    for key in SECTIONS:
        if not cfg.get(key):
            raise UserError(f"{cfg.config_path}: '{key}' is missing; training needs {', '.join(SECTIONS)}")
    if cfg.lora_config or cfg.cached_video or cfg.cached_text:
        key = next(k for k in ("lora_config", "cached_video", "cached_text") if cfg[k])
        raise UserError(f"{key}: not available in this version; remove it")
    weights = cfg.condition_config
    for name in weights or {}:
        if name not in CONDITIONS:
            raise UserError(f"condition_config: unknown condition {name!r}; valid: {', '.join(CONDITIONS)}")
    if bool(weights) != bool(cfg.model.get("cond_embed", False)):
        raise UserError(
            "condition_config and model.cond_embed belong together: set both (image conditions) or neither (text only)"
        )
    ae = build_module({**cfg.ae, "from_pretrained": None}, MODELS, device_map="meta")
    patch, channels = cfg.patch_size, ae.latent_channels
    expected = channels * patch**2
    if cfg.model.get("in_channels", expected) != expected:
        raise UserError(
            f"model.in_channels={cfg.model['in_channels']} does not fit: {channels} latent channels in patches of "
            f"{patch}x{patch} make {expected}"
        )
    check_frames(cfg.bucket_config, ae)
    dropout = cfg.dropout_ratio or {}
    return InputOptions(
        patch_size=patch,
        spatial_multiple=ae.compression[1] * patch,
        sigma_min=cfg.sigma_min,
        guidance=cfg.guidance,
        no_i2v_ref_loss=cfg.no_i2v_ref_loss,
        t5_dropout=dropout.get("t5", 0.0),
        clip_dropout=dropout.get("clip", 0.0),
        condition_weights=dict(weights) if weights else None,
    )


def batch_loss(
    model: nn.Module,
    encode: InputEncoder,
    device: torch.device,
    dtype: torch.dtype,
    batch: dict[str, Any],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch of clips."""  # fmt: skip
    return diffusion_loss(model, encode(to_device(batch, device, dtype), generator)), {}


class Trainer:
    """One training run of the diffusion model, on one process.

    Args:
        cfg: resolved config (``TrainOptions``).

    Raises:
        UserError: anything wrong with config, table, checkpoint or weight files.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.options = check_config(cfg)
        self.device, self.dtype = pick_device(cfg.device), torch_dtype(cfg.dtype)
        self.resume = find_checkpoint(cfg.load, cfg.outputs) if cfg.load else None
        self.states = load_states(self.resume) if self.resume else RunningStates(0, 0, 0, 0)
        self.dataset = build_module(dict(cfg.dataset), DATASETS)
        self.loader, self.sampler = build_train_loader(
            self.dataset,
            cfg.bucket_config,
            multiple=self.options.spatial_multiple,
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor,
            pin_memory=self.device.type == "cuda",
        )
        self.total_steps = cfg.max_steps or cfg.epochs * len(self.sampler) // cfg.accumulation_steps
        check_unfinished(self.states, self.total_steps)

    def _build(self, section: str, **overrides: Any) -> Any:
        return build_module(
            dict(self.cfg[section]), MODELS, device_map=str(self.device), torch_dtype=self.dtype, **overrides
        )

    def _encoder(self) -> InputEncoder:
        ae, t5, clip = self._build("ae"), self._build("t5"), self._build("clip")
        del ae.decoder  # training only encodes
        return InputEncoder(ae.eval().requires_grad_(False), t5, clip, self.options, self.cfg.keep_encoded)

    def run(self) -> Path:
        """Train to the end; returns the experiment folder."""
        cfg = self.cfg
        encoder = self._encoder()
        torch.manual_seed(cfg.seed)
        overrides = {"from_pretrained": str(self.resume / "model" / "model.safetensors")} if self.resume else {}
        model = self._build("model", **overrides).train()
        folder = create_experiment(cfg, self.resume)
        logger.info("%.2fM parameters on %s", sum(p.numel() for p in model.parameters()) / 1e6, self.device)
        ema = EMA(model, cfg.ema_decay) if cfg.ema_decay else None
        optimizer = create_optimizer(model.named_parameters(), cfg.optim)
        engine = SingleEngine(model, optimizer, cfg.grad_clip)
        if self.resume:
            engine.load_state_dict(load_part(self.resume, "optimizer"))
            if ema:
                ema.load_state_dict(load_weights(self.resume, "ema"), self.states.ema_updates)
        schedule = create_schedule(
            optimizer,
            warmup_steps=cfg.warmup_steps or 0,
            total_steps=self.total_steps,
            cosine=cfg.use_cosine_scheduler,
            flat_share=cfg.flat_share,
            start_step=self.states.global_step,
            **({"initial_lr": cfg.initial_lr} if cfg.initial_lr is not None else {}),
        )
        logger.info("steps %d to %d\n%s", self.states.global_step, self.total_steps, self.sampler.describe())
        settings = LoopSettings(cfg.seed, cfg.accumulation_steps, cfg.ckpt_every, cfg.keep_n_latest, self.total_steps)
        log = MetricLog(folder, self.total_steps, self.states.global_step, cfg.log_every)
        metadata = layout_metadata(model.config)
        loop = TrainLoop(engine, schedule, ema, log, folder, settings, self.states, len(self.sampler), metadata)
        try:
            batches = endless(self.loader, self.sampler, self.states.micro_step)
            loop.run(batches, partial(batch_loss, model, encoder, self.device, self.dtype))
        finally:
            log.close()
        return folder
