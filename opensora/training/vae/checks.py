"""What a config of autoencoder training asks for, and all about it that can be judged before models are built."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opensora.acceleration.parallel_context import Sizes
from opensora.acceleration.plugins import plugin_name
from opensora.config.commands import VaeTrainOptions
from opensora.config.options import DiscriminatorLossOptions, GeneratorLossOptions, VaeLossOptions
from opensora.datasets.buckets import BucketTable
from opensora.models.autoencoder import Autoencoder, LatentSpec, as_autoencoder, check_buckets
from opensora.models.build import build_on_meta, check_weights
from opensora.models.vae.losses import VAELoss
from opensora.models.vae.lpips import build_lpips, check_lpips
from opensora.training.checks import check_loop, check_optimizer
from opensora.training.report.trackers import check_trackers
from opensora.training.vae.adversarial import AdversarialOptions
from opensora.training.vae.loss import LengthMixer
from opensora.training.weights.adapters import freeze
from opensora.training.weights.groups import check_groups
from opensora.training.weights.optimizer import check_settings
from opensora.utils.errors import UserError

PLUGINS = ("ddp", "zero1", "zero2", "torch_ddp")  # those that leave the autoencoder whole
SIZE_MULTIPLE = 16  # heights and widths in pixels; more where the autoencoder compresses more


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


@dataclass(frozen=True)
class VAEPlan:
    """What `check_config` found out.

    Args:
        model: the autoencoder without weights, built once for all who ask it for sizes.
        multiple: heights and widths are multiples of this many pixels.
        mixer: shortens clips.
        adversarial: options of the losses of and against the discriminator, None without one.
    """

    model: nn.Module
    multiple: int
    mixer: LengthMixer
    adversarial: AdversarialOptions | None


def plan_stages(cfg: VaeTrainOptions, total: int) -> list[Stage]:
    """Single frames first (``image_steps``), then the video buckets up to optimizer step ``total``."""
    stages = []
    assert cfg.bucket_config is not None
    if cfg.image_steps:
        if not cfg.image_bucket_config:
            raise UserError("image_steps needs image_bucket_config, e.g. {'64px': {1: (1.0, 32)}}")
        end = min(cfg.image_steps, total)
        stages.append(Stage("images", 0, end, cfg.image_bucket_config, cfg.image_lr or cfg.optim.lr))
    if total > cfg.image_steps:
        stages.append(Stage("videos", cfg.image_steps, total, cfg.bucket_config, cfg.optim.lr))
    return stages


def check_config(cfg: VaeTrainOptions, world_size: int = 1) -> VAEPlan:
    """Judge a config of autoencoder training; nothing is built but models without memory.

    Args:
        cfg: resolved config.
        world_size: number of processes.

    Raises:
        UserError: names the key and what would be right.
    """
    for key in ("model", "dataset", "bucket_config", "optim"):
        if not getattr(cfg, key) or (key == "optim" and not cfg.optim.given):
            raise UserError(
                f"{cfg.config_path}: '{key}' is missing; VAE training needs model, dataset, bucket_config and optim"
            )
    assert cfg.model is not None
    check_loop(cfg)
    check_plugin(cfg, world_size)
    check_optimizer(cfg, world_size)
    check_trackers(cfg)
    check_weights("model", cfg.model)
    model = build_on_meta(cfg.model)
    autoencoder = as_autoencoder(model)
    multiple = max(SIZE_MULTIPLE, *autoencoder.compression[1:])
    tables = [BucketTable(config, multiple) for config in (cfg.bucket_config, cfg.image_bucket_config) if config]
    for config in (cfg.bucket_config, cfg.image_bucket_config):
        check_lengths(config or {}, autoencoder)
    check_loss(cfg.vae_loss_config)
    if cfg.grad_checkpoint and not autoencoder.supports_grad_checkpoint:
        raise UserError(f"grad_checkpoint=True: {cfg.model.type!r} does not recompute blocks; set False")
    adversarial = check_adversarial(cfg, tables) if cfg.discriminator else None
    trained = copy.deepcopy(model)
    check_freeze(cfg.freeze_layers, trained, adversarial is not None)
    if cfg.freeze_layers != "all":
        check_groups(trained.named_parameters(), cfg.optim)
    mixer = LengthMixer(cfg.mixed_strategy, cfg.mixed_image_ratio, LatentSpec.of(autoencoder))
    return VAEPlan(model, multiple, mixer, adversarial)


def check_plugin(cfg: VaeTrainOptions, world_size: int) -> None:
    """See that the plugin can train an autoencoder on that many processes: they divide the data, not the model.

    Raises:
        UserError: names the plugin or section and what would be right.
    """
    name = plugin_name(cfg.plugin)
    sizes = Sizes.of(name, cfg.plugin_config)
    if world_size == 1:
        return
    if name not in PLUGINS or max(sizes.tp, sizes.sp, sizes.branch) > 1:
        raise UserError(
            f"plugin={cfg.plugin}: {world_size} processes train an autoencoder by dividing the data; use "
            f"{', '.join(PLUGINS)}, with sizes of 1 in plugin_config"
        )
    if cfg.image_steps:
        raise UserError("image_steps: training in two stages is for one process; train them as two runs instead")
    if name != "ddp":
        from opensora.acceleration.colossal import require_colossalai

        require_colossalai(on_cpu=False)


def check_lengths(bucket_config: Mapping[str, Mapping[int, Any]], autoencoder: Autoencoder) -> None:
    """Refuse bucket lengths that do not come back from the autoencoder.

    Raises:
        UserError: names the length and the nearest valid one.
    """
    check_buckets(bucket_config, autoencoder)
    for resolution, lengths in bucket_config.items():
        for frames in lengths:
            if not autoencoder.keeps_length(frames):
                raise UserError(
                    f"bucket_config[{resolution!r}]: {frames} frames have one latent frame, which this autoencoder "
                    f"decodes to a picture; use 1 or {2 * autoencoder.compression[0]}"
                )


def check_loss(section: VaeLossOptions | None) -> None:
    """See that the weights of LPIPS are there, where it counts.

    Raises:
        UserError: they are missing or do not fit.
    """
    if section is not None and section.perceptual_loss_weight:
        check_lpips(section.lpips)


def build_loss(section: VaeLossOptions | None, device: torch.device, grad_checkpoint: bool) -> VAELoss:
    """The reconstruction loss of a config, with LPIPS on ``device`` where it counts."""
    options = section or VaeLossOptions()
    if not options.perceptual_loss_weight:
        return VAELoss(options)
    return VAELoss(options, build_lpips(options.lpips, device, grad_checkpoint=grad_checkpoint))


def check_adversarial(cfg: VaeTrainOptions, tables: list[BucketTable]) -> AdversarialOptions:
    """Options of adversarial training.

    Raises:
        UserError: no optimizer for the discriminator, or clips too small for its patches.
    """
    if cfg.optim_discriminator is None or "lr" not in cfg.optim_discriminator.given:
        raise UserError(
            "discriminator: it needs an optimizer of its own; give optim_discriminator, e.g. "
            "dict(cls='HybridAdam', lr=1e-4, betas=(0.9, 0.98)), or remove the discriminator"
        )
    check_settings(cfg.optim_discriminator, "optim_discriminator")
    assert cfg.discriminator is not None
    check_weights("discriminator", cfg.discriminator)
    discriminator: Any = build_on_meta(cfg.discriminator)
    mixed = cfg.mixed_strategy is not None
    for bucket in (bucket for table in tables for bucket in table.buckets):
        frames = 1 if mixed else bucket.num_frames
        patches = discriminator.patches(frames, bucket.height, bucket.width) * bucket.batch_size
        if patches < 2:  # batch normalisation needs two values
            raise UserError(
                f"discriminator.n_layers={discriminator.n_layers}: {bucket.batch_size} clips of {frames} frames, "
                f"{bucket.height}x{bucket.width} have {patches} patches of it, and it needs 2; lower n_layers, or take "
                "larger clips or batches"
            )
    return AdversarialOptions(
        cfg.gen_loss_config or GeneratorLossOptions(), cfg.disc_loss_config or DiscriminatorLossOptions()
    )


def check_freeze(parts: str | None, autoencoder: nn.Module, adversarial: bool) -> None:
    """See that something is left to train, and that the adversarial weight can be measured.

    Raises:
        UserError: unknown parts, nothing left, or the last layer frozen while there is a discriminator.
    """
    if not parts:
        return
    if parts == "all":
        if not adversarial:
            raise UserError("freeze_layers=all leaves nothing to train: give a discriminator, or freeze fewer parts")
        return
    freeze(autoencoder, parts)
    if adversarial and not autoencoder.get_last_layer().requires_grad:  # type: ignore[operator]
        raise UserError(
            f"freeze_layers={parts}: the adversarial weight is measured on the autoencoder's last layer, which is "
            "frozen; leave it out, freeze all, or train without discriminator"
        )
