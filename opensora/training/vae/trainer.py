"""Training of the video autoencoders."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from opensora.config.commands import VaeTrainOptions
from opensora.config.options import SchedulerOptions
from opensora.datasets.dataloader import endless, prefetch
from opensora.datasets.source import build_source
from opensora.training.checkpoint.folder import load_weights
from opensora.training.hooks import Hook
from opensora.training.loop import TrainLoop
from opensora.training.report.metrics import MetricLog
from opensora.training.report.profiling import TorchProfile
from opensora.training.roles import MODEL, Role
from opensora.training.run import Run, log_data, log_size
from opensora.training.vae.adversarial import DISC, DISCRIMINATOR, Adversary
from opensora.training.vae.checks import Stage, build_loss, check_config, plan_stages
from opensora.training.vae.loss import VAEStep
from opensora.training.weights.adapters import TrainedWeights, freeze
from opensora.training.weights.ema import EMA
from opensora.training.weights.optimizer import Schedule, load_optimizer
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import is_stored, open_weights
from opensora.utils.weights_loading import check_match

logger = get_logger(__name__)

DISCRIMINATOR_SEED = 7_919  # beside the run's seed, so that a discriminator does not change the autoencoder's start


class VAETrainer:
    """One training run of a video autoencoder, on this process or all that torchrun has started.

    Args:
        cfg: resolved config.
        local_rank: number of this process on its machine.
        world_size: number of processes.

    Raises:
        UserError: anything wrong with config, table or checkpoint, before the model is built.
    """

    def __init__(self, cfg: VaeTrainOptions, local_rank: int = 0, world_size: int = 1) -> None:
        self.cfg = cfg
        self.plan = check_config(cfg, world_size)
        self.start = Run.start(cfg, local_rank, world_size)
        if self.start.resume is not None:
            check_match(self.plan.model, open_weights(self.start.resume / "model"))
        assert cfg.dataset is not None
        self.dataset = build_source(cfg.dataset, require_text=False)
        length = len(self.start.loader(self.dataset, cfg.bucket_config or {}, self.plan.multiple)[1])
        per_epoch = length // cfg.accumulation_steps
        self.stages = plan_stages(cfg, self.start.last_step(lambda epochs: cfg.image_steps + epochs * per_epoch))
        self._move_start(length)

    def _move_start(self, epoch_length: int) -> None:
        """Go on at another place in the data, if ``start_epoch`` or ``start_step`` say so."""
        epoch, step = self.cfg.start_epoch, self.cfg.start_step
        if len(self.stages) > 1 and (epoch, step) != (None, None):
            raise UserError("start_epoch and start_step: not with image_steps, whose stages restart the data")
        self.start.states.start_at(epoch, step, epoch_length)

    def run(self) -> Path:
        """Train to the end; returns the experiment folder.

        Raises:
            UserError: the run cannot be resumed, see :class:`opensora.training.loop.TrainLoop`.
            SystemExit: status 143, after SIGTERM and a checkpoint.
        """
        with self.start.claimed_folder() as folder:
            self._run(folder)
        return folder

    def _run(self, folder: Path) -> None:
        cfg, start = self.cfg, self.start
        self.weights = self._build_model()
        self.model: Any = self.weights.model
        self.loss = build_loss(cfg.vae_loss_config, start.device, cfg.grad_checkpoint)
        self.ema = EMA(self.weights, cfg.ema_decay, start.parallel.replica, start.device) if cfg.ema_decay else None
        if self.ema and start.resume is not None:
            self.ema.load_state_dict(load_weights(start.resume, "ema"), start.states.ema_updates)
        self.discriminator = self._build_discriminator() if cfg.discriminator else None
        log = start.open_log(folder, self.stages[-1].end)
        with ExitStack() as stack:
            stack.callback(log.close)
            hooks: list[Hook] = [TorchProfile(folder)] if cfg.profile and start.parallel.rank == 0 else []
            for hook in hooks:
                stack.callback(hook.close)
            for stage in self.stages:
                if start.states.global_step < stage.end:
                    self._run_stage(stage, folder, log, hooks)

    def _build_model(self) -> TrainedWeights:
        """The autoencoder, its trained part marked, with the weights of the checkpoint to resume from."""
        cfg, resume = self.cfg, self.start.resume
        assert cfg.model is not None
        torch.manual_seed(cfg.seed)
        model = self.start.build(cfg.model, torch_dtype=self.start.master_dtype).train()
        if cfg.grad_checkpoint:
            model.set_grad_checkpoint(last_layer=not cfg.discriminator)
        if resume is not None:
            model.load_state_dict(load_weights(resume))
        if cfg.freeze_layers == "all":
            model.requires_grad_(False)
        else:
            freeze(model, cfg.freeze_layers)
        log_size(model, "autoencoder", self.start.device)
        masters = self.start.masters_of(model, cfg.optim)
        if masters is not None and resume is not None and is_stored(resume / "master.safetensors"):
            masters.load_state_dict(load_weights(resume, "master"))
        return TrainedWeights(model, masters)

    def _build_discriminator(self) -> Role:
        """The discriminator in training, as the checkpoint has it unless it is to be reinitialised."""
        cfg, start = self.cfg, self.start
        assert cfg.discriminator is not None
        assert cfg.optim_discriminator is not None
        optim = cfg.optim_discriminator
        torch.manual_seed(cfg.seed + DISCRIMINATOR_SEED)
        model = start.build(cfg.discriminator, torch_dtype=start.master_dtype).train()
        log_size(model, "discriminator", start.device)
        states, anew = start.states, cfg.restart_disc or start.past_of(DISCRIMINATOR) is None
        if anew:
            states.discriminator_since = states.global_step
            if start.resume is not None:
                reason = "restart_disc" if cfg.restart_disc else f"there is none in {start.resume}"
                logger.warning("the discriminator is reinitialised: %s", reason)
        since = states.discriminator_since  # its schedule is counted from there, also when the run is resumed again

        def schedule(optimizer: Optimizer) -> Schedule:
            options = cfg.disc_lr_scheduler or SchedulerOptions()
            total = self.stages[-1].end - since
            return start.schedule(optimizer, options, total, states.global_step - since, optim)

        return start.role(
            DISCRIMINATOR, model, optim, schedule, prefix=DISC, anew=anew, load_optimizer_state=cfg.load_optimizer
        )

    def _run_stage(self, stage: Stage, folder: Path, log: MetricLog, hooks: list[Hook]) -> None:
        cfg, start, states = self.cfg, self.start, self.start.states
        if states.global_step == stage.start and stage.name == "videos" and cfg.image_steps:
            self._inflate()
        autoencoder = self._role(stage)
        loader, sampler = start.loader(self.dataset, stage.bucket_config, self.plan.multiple)
        log_data(sampler, f"{stage.name}: steps {states.global_step} to {stage.end}")
        adversary = None
        if self.discriminator is not None and self.plan.adversarial is not None:
            adversary = Adversary(self.discriminator, self.plan.adversarial)
        step = VAEStep(
            autoencoder.engine.model if autoencoder is not None else self.model,
            self.model,
            self.loss,
            self.plan.mixer.on_rank(start.parallel.dp.rank, start.parallel.dp.size),
            start.device,
            start.dtype,
            states,
            adversary,
            cfg.latent_noise,
        )
        roles = [role for role in (autoencoder, self.discriminator) if role is not None]
        loop = TrainLoop(roles, self.weights, self.ema, log, folder, start.settings(stage.end), states, len(sampler))
        # Every stage begins its data at the front; the place in it follows from the micro-steps done in the stage.
        place = states.micro_step - stage.start * cfg.accumulation_steps
        loop.run(prefetch(endless(loader, sampler, place), start.device, start.dtype), step, hooks)

    def _inflate(self) -> None:
        """From pictures to videos: kernels then treat each frame as the picture they were trained on."""
        if not self.model.inflate_from_images():
            return
        if self.weights.masters is not None:
            self.weights.masters.load_state_dict({name: p.detach() for name, p in self.model.named_parameters()})
        if self.ema:  # the average's kernels changed meaning with the model's
            self.ema = EMA(self.weights, self.ema.decay, self.ema.axis, self.ema.device)

    def _role(self, stage: Stage) -> Role | None:
        """The autoencoder in training, with the engine and schedule of a stage; None if it is frozen as a whole."""
        cfg, start, masters = self.cfg, self.start, self.weights.masters
        done = start.states.global_step - stage.start
        if cfg.freeze_layers == "all":
            return None
        optim = replace(cfg.optim, lr=stage.lr)
        engine = start.engine(self.model, optim, masters)
        if start.resume is not None and done and cfg.load_optimizer:
            load_optimizer(engine, start.resume)
            if masters is None and engine.rounded_to is not None:
                start.load_masters(engine, None)  # there are none if all weights were frozen
        options = cfg.lr_scheduler or SchedulerOptions()
        schedule = start.schedule(engine.optimizer, options, stage.steps, done, optim)
        return Role(MODEL, engine, schedule, masters)
