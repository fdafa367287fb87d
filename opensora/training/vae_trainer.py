"""Training of the video autoencoders."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.engine import SingleEngine
from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataloader import build_train_loader, endless, to_device
from opensora.diffusion.building import pick_device, torch_dtype
from opensora.models.hunyuan_vae.inflate import inflate_from_images
from opensora.models.vae.losses import VAELoss
from opensora.registry import DATASETS, MODELS, build_module
from opensora.training.checkpoint import RunningStates, find_checkpoint, load_part, load_states, load_weights
from opensora.training.checks import check_frames, check_unfinished
from opensora.training.ema import EMA
from opensora.training.experiment import create_experiment
from opensora.training.loop import LoopSettings, TrainLoop
from opensora.training.metrics import MetricLog
from opensora.training.optimizer import create_optimizer, create_schedule
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stretch of optimizer steps with its own data, optimizer and schedule."""

    name: str
    start: int
    end: int
    bucket_config: dict
    lr: float

    @property
    def steps(self) -> int:
        """Length in optimizer steps."""
        return self.end - self.start


def plan_stages(cfg: Any, steps_per_epoch: int) -> list[Stage]:
    """Single frames first (``image_steps``), then the video buckets up to ``max_steps`` (or ``epochs``)."""
    total = cfg.max_steps or cfg.image_steps + cfg.epochs * steps_per_epoch
    stages = []
    if cfg.image_steps:
        if not cfg.image_bucket_config:
            raise UserError("image_steps needs image_bucket_config, e.g. {'64px': {1: (1.0, 32)}}")
        end = min(cfg.image_steps, total)
        stages.append(Stage("images", 0, end, cfg.image_bucket_config, cfg.image_lr or cfg.optim["lr"]))
    if total > cfg.image_steps:
        stages.append(Stage("videos", cfg.image_steps, total, cfg.bucket_config, cfg.optim["lr"]))
    return stages


def check_config(cfg: Any) -> VAELoss:
    """Everything about a VAE training config that can be judged before models are built; returns the loss.

    Raises:
        UserError: names the key and what would be right.
    """
    for key in ("model", "dataset", "bucket_config"):
        if not cfg.get(key):
            raise UserError(
                f"{cfg.config_path}: '{key}' is missing; VAE training needs model, dataset and bucket_config"
            )
    if cfg.discriminator:
        raise UserError("discriminator: adversarial training is not available in this version; remove the section")
    BucketTable(cfg.bucket_config)
    check_frames(cfg.bucket_config, build_module({**cfg.model, "from_pretrained": None}, MODELS, device_map="meta"))
    return VAELoss(**(cfg.vae_loss_config or {}))


def vae_loss(
    model: nn.Module,
    loss: VAELoss,
    device: torch.device,
    dtype: torch.dtype,
    batch: dict[str, Any],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch of clips; the posterior is sampled from ``generator``."""  # fmt: skip
    video = to_device(batch, device, dtype)["video"]
    reconstruction, posterior, _ = model(video, generator=generator)
    total, parts = loss(video, reconstruction, posterior)
    return total, {name: float(value) for name, value in parts.items()}


class VAETrainer:
    """One training run of a video autoencoder, on one process.

    Args:
        cfg: resolved config (``VaeTrainOptions``).

    Raises:
        UserError: anything wrong with config, table or checkpoint, before the model is built.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loss = check_config(cfg)
        self.device, self.dtype = pick_device(cfg.device), torch_dtype(cfg.dtype)
        self.resume = find_checkpoint(cfg.load, cfg.outputs) if cfg.load else None
        self.dataset = build_module(dict(cfg.dataset), DATASETS, require_text=False)
        _, sampler = self._loader(cfg.bucket_config)
        self.stages = plan_stages(cfg, len(sampler) // cfg.accumulation_steps)
        self.states = load_states(self.resume) if self.resume else RunningStates(0, 0, 0, 0)
        check_unfinished(self.states, self.stages[-1].end)

    def _loader(self, bucket_config: dict):
        return build_train_loader(
            self.dataset,
            bucket_config,
            seed=self.cfg.seed,
            num_workers=self.cfg.num_workers,
            prefetch_factor=self.cfg.prefetch_factor,
            pin_memory=self.device.type == "cuda",
        )

    def run(self) -> Path:
        """Train to the end; returns the experiment folder."""
        cfg = self.cfg
        folder = create_experiment(cfg, self.resume)
        torch.manual_seed(cfg.seed)
        self.model = build_module(dict(cfg.model), MODELS, device_map=str(self.device), torch_dtype=self.dtype)
        self.model.train()
        if cfg.grad_checkpoint:
            self.model.set_grad_checkpoint()
        if self.resume:
            self.model.load_state_dict(load_weights(self.resume))
        logger.info("%.2fM parameters on %s", sum(p.numel() for p in self.model.parameters()) / 1e6, self.device)
        self.ema = EMA(self.model, cfg.ema_decay) if cfg.ema_decay else None
        if self.ema and self.resume:
            self.ema.load_state_dict(load_weights(self.resume, "ema"), self.states.ema_updates)
        log = MetricLog(folder, self.stages[-1].end, self.states.global_step, cfg.log_every)
        try:
            for stage in self.stages:
                if self.states.global_step < stage.end:
                    self._run_stage(stage, folder, log)
        finally:
            log.close()
        return folder

    def _run_stage(self, stage: Stage, folder: Path, log: MetricLog) -> None:
        cfg = self.cfg
        fresh = self.states.global_step == stage.start
        if fresh and stage.name == "videos" and cfg.image_steps:
            inflate_from_images(self.model)
            if self.ema:  # the average's kernels changed meaning with the model's
                self.ema = EMA(self.model, cfg.ema_decay)
        optimizer = create_optimizer(self.model.named_parameters(), {**cfg.optim, "lr": stage.lr})
        engine = SingleEngine(self.model, optimizer, cfg.grad_clip)
        if self.resume and not fresh and cfg.load_optimizer:
            engine.load_state_dict(load_part(self.resume, "optimizer"))
        scheduler = cfg.lr_scheduler or {}
        schedule = create_schedule(
            optimizer,
            warmup_steps=scheduler.get("warmup_steps") or 0,
            total_steps=stage.steps,
            cosine=scheduler.get("cosine", False),
            flat_share=scheduler.get("flat_share", 0.0),
            start_step=self.states.global_step - stage.start,
        )
        loader, sampler = self._loader(stage.bucket_config)
        logger.info("%s: steps %d to %d\n%s", stage.name, self.states.global_step, stage.end, sampler.describe())
        settings = LoopSettings(cfg.seed, cfg.accumulation_steps, cfg.ckpt_every, cfg.keep_n_latest, stage.end)
        loop = TrainLoop(engine, schedule, self.ema, log, folder, settings, self.states, len(sampler))
        # Every stage begins its data at the front; the place in it follows from the steps done in the stage.
        stage_micro_step = (self.states.global_step - stage.start) * cfg.accumulation_steps
        batches = endless(loader, sampler, stage_micro_step)
        loop.run(batches, partial(vae_loss, self.model, self.loss, self.device, self.dtype))
