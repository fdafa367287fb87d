"""Training of the video autoencoders."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.acceleration.engine import Engine
from opensora.acceleration.parallel_context import ParallelContext, launch
from opensora.acceleration.plugins import create_context, create_engine, keeps_masters
from opensora.acceleration.rank_zero import from_rank_zero
from opensora.acceleration.sharding import WeightLayout
from opensora.datasets.dataloader import build_train_loader, endless, prefetch
from opensora.datasets.source import build_source
from opensora.models.build import build_on_meta
from opensora.registry import MODELS, build_module
from opensora.training.checkpoint.folder import RunningStates, find_checkpoint, load_states, load_weights
from opensora.training.checks import check_unfinished
from opensora.training.experiment import claimed_experiment, create_experiment, experiment_folder
from opensora.training.loop import LoopSettings, TrainLoop
from opensora.training.report.metrics import MetricLog
from opensora.training.report.trackers import create_trackers
from opensora.training.vae.adversarial import AdversarialEngine, AdversarialLoop, Adversary
from opensora.training.vae.checks import Stage, build_loss, check_config, plan_stages
from opensora.training.vae.loss import VAEStep
from opensora.training.weights.adapters import TrainedWeights, freeze
from opensora.training.weights.ema import EMA
from opensora.training.weights.masters import MasterWeights, optimizer_factory
from opensora.training.weights.optimizer import Schedule, create_schedule, load_optimizer
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import is_stored, open_weights
from opensora.utils.weights_loading import check_match

logger = get_logger(__name__)

DISCRIMINATOR_SEED = 7_919  # beside the run's seed, so that a discriminator does not change the autoencoder's start


class VAETrainer:
    """One training run of a video autoencoder, on this process or all that `launch` has joined.

    Args:
        cfg: resolved config (``VaeTrainOptions``).
        local_rank: number of this process on its machine.
        world_size: number of processes.

    Raises:
        UserError: anything wrong with config, table or checkpoint, before the model is built.
    """

    def __init__(self, cfg: Any, local_rank: int = 0, world_size: int = 1) -> None:
        self.cfg = cfg
        self.plan = check_config(cfg, world_size)
        self.device, self.dtype = pick_device(cfg.device, local_rank), torch_dtype(cfg.dtype)
        self.parallel = ParallelContext(device=self.device)
        if world_size > 1:
            launch(self.device)
            self.parallel = create_context(cfg.plugin, cfg.plugin_config, self.device)
        self.resume = find_checkpoint(cfg.load, cfg.outputs) if cfg.load else None
        experiment_folder(cfg, self.resume)  # refuses one that is taken
        if self.resume:
            check_match(build_on_meta(cfg.model), open_weights(self.resume / "model"))
        self.dataset = build_source(cfg.dataset, require_text=False)
        _, sampler = self._loader(cfg.bucket_config)
        self.stages = plan_stages(cfg, len(sampler) // cfg.accumulation_steps)
        self.states = load_states(self.resume) if self.resume else RunningStates(0, 0, 0, 0)
        self.states.move_to(self.parallel.dp.size)
        check_unfinished(self.states, self.stages[-1].end)
        self._move_start(len(sampler))

    def _loader(self, bucket_config: dict):
        return build_train_loader(
            self.dataset,
            bucket_config,
            multiple=self.plan.multiple,
            seed=self.cfg.seed,
            num_workers=self.cfg.num_workers,
            prefetch_factor=self.cfg.prefetch_factor,
            pin_memory=self.device.type == "cuda",
            num_replicas=self.parallel.dp.size,
            rank=self.parallel.dp.rank,
        )

    def _move_start(self, epoch_length: int) -> None:
        """Go on at another place in the data, if ``start_epoch`` or ``start_step`` say so."""
        epoch, step = self.cfg.start_epoch, self.cfg.start_step
        if len(self.stages) > 1 and (epoch, step) != (None, None):
            raise UserError("start_epoch and start_step: not with image_steps, whose stages read the data anew")
        self.states.start_at(epoch, step, epoch_length)

    def run(self) -> Path:
        """Train to the end; returns the experiment folder.

        Raises:
            UserError: the run cannot go on, see :class:`opensora.training.loop.TrainLoop`.
            SystemExit: status 143, after SIGTERM and a checkpoint.
        """
        with claimed_experiment(self.cfg, self.resume, self.parallel) as folder:
            self._run(folder)
        return folder

    def _run(self, folder: Path) -> None:
        cfg, rank = self.cfg, self.parallel.rank
        self.weights = self._build_model()
        self.model: Any = self.weights.model
        self.loss = build_loss(cfg.vae_loss_config, self.device, cfg.grad_checkpoint)
        self.ema = EMA(self.weights, cfg.ema_decay) if cfg.ema_decay else None
        if self.ema and self.resume:
            self.ema.load_state_dict(load_weights(self.resume, "ema"), self.states.ema_updates)
        self.adversary = self._build_adversary() if cfg.discriminator else None
        start = partial(create_experiment, cfg, self.resume, folder)
        from_rank_zero(start, self.device, rank, self.parallel.world_size)
        log = MetricLog(
            folder,
            self.stages[-1].end,
            self.states.global_step,
            cfg.log_every,
            trackers=create_trackers(cfg, folder, self.states.global_step) if rank == 0 else [],
            device=self.device,
            parallel=self.parallel,
        )
        try:
            with profiling(cfg.profile and rank == 0, folder) as on_step:
                for stage in self.stages:
                    if self.states.global_step < stage.end:
                        self._run_stage(stage, folder, log, on_step)
        finally:
            log.close()

    def _build(self, section: str, seed: int) -> tuple[Any, torch.dtype]:
        """A new model in training mode, and the dtype of its weights: fp32 if the plugin rounds them itself."""
        dtype = torch.float32 if keeps_masters(self.cfg.plugin, self.parallel) else self.dtype
        torch.manual_seed(seed)
        model = build_module(dict(self.cfg[section]), MODELS, device_map=str(self.device), torch_dtype=dtype)
        return model.train(), dtype

    def _build_model(self) -> TrainedWeights:
        """The autoencoder, its trained part marked, with the weights of the checkpoint to go on from."""
        cfg = self.cfg
        model, dtype = self._build("model", cfg.seed)
        if cfg.grad_checkpoint:
            model.set_grad_checkpoint(last_layer=not cfg.discriminator)
        if self.resume:
            model.load_state_dict(load_weights(self.resume))
        if cfg.freeze_layers == "all":
            model.requires_grad_(False)
        else:
            freeze(model, cfg.freeze_layers)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        logger.info("%.2fM parameters, %.2fM of them trained, on %s", total / 1e6, trained / 1e6, self.device)
        masters = MasterWeights(model) if dtype != torch.float32 and trained else None
        if masters is not None and self.resume and is_stored(self.resume / "master.safetensors"):
            masters.load_state_dict(load_weights(self.resume, "master"))
        return TrainedWeights(model, masters)

    def _build_adversary(self) -> Adversary:
        """The discriminator with optimizer and schedule, as the checkpoint has them unless it is to start anew."""
        cfg, resume = self.cfg, self.resume
        model, dtype = self._build("discriminator", cfg.seed + DISCRIMINATOR_SEED)
        goes_on = resume is not None and not cfg.restart_disc and (resume / "discriminator").is_dir()
        past = resume if goes_on else None
        if resume and past is None:
            reason = "restart_disc" if cfg.restart_disc else f"there is none in {resume}"
            logger.warning("the discriminator starts anew: %s", reason)
        if past is not None:
            model.load_state_dict(load_weights(past, "discriminator"))
        masters = MasterWeights(model) if dtype != torch.float32 else None
        kept_masters = past is not None and (past / "disc_master").is_dir()
        if past is not None and masters is not None and kept_masters:
            masters.load_state_dict(load_weights(past, "disc_master"))
        engine = self._wrap(model, cfg.optim_discriminator, masters)
        if past is not None and masters is None and kept_masters:
            engine.load_master_state(load_weights(past, "disc_master"))
        if past is not None and cfg.load_optimizer:
            load_optimizer(engine, past, "disc_optimizer")
        if past is None:
            self.states.discriminator_since = self.states.global_step
        since = self.states.discriminator_since  # its schedule is counted from there, also when the run goes on again
        schedule = self._schedule(
            engine.optimizer,
            cfg.optim_discriminator["lr"],
            cfg.disc_lr_scheduler,
            self.stages[-1].end - since,
            self.states.global_step - since,
        )
        assert self.plan.adversarial is not None
        logger.info("discriminator: %.2fM parameters", sum(p.numel() for p in model.parameters()) / 1e6)
        return Adversary(engine, schedule, self.plan.adversarial, masters)

    def _wrap(self, model: nn.Module, optim: Mapping[str, Any], masters: MasterWeights | None) -> Engine:
        """Engine of the config's plugin around a whole model and a new optimizer."""
        return create_engine(
            self.cfg.plugin,
            model,
            optimizer_factory(optim, masters),
            self.parallel,
            max_norm=self.cfg.grad_clip,
            dtype=self.dtype,
            config=self.cfg.plugin_config,
            layout=WeightLayout(),
            masters=masters.named_parameters() if masters is not None else None,
        )

    def _schedule(
        self, optimizer: Optimizer, lr: float, section: Mapping[str, Any] | None, total: int, start: int
    ) -> Schedule:
        """Schedule of an optimizer that is at step ``start`` of ``total``; ``lr`` holds, whatever a checkpoint says."""
        options = section or {}
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr
        initial = {} if self.cfg.initial_lr is None else {"initial_lr": self.cfg.initial_lr}
        return create_schedule(
            optimizer,
            warmup_steps=options.get("warmup_steps") or 0,
            total_steps=total,
            cosine=options.get("cosine", False),
            flat_share=options.get("flat_share", 0.0),
            start_step=start,
            **initial,
        )

    def _run_stage(self, stage: Stage, folder: Path, log: MetricLog, on_step: Callable[[int], None] | None) -> None:
        cfg = self.cfg
        if self.states.global_step == stage.start and stage.name == "videos" and cfg.image_steps:
            self._inflate()
        engine, schedule = self._engine(stage, log)
        loader, sampler = self._loader(stage.bucket_config)
        logger.info("%s: steps %d to %d\n%s", stage.name, self.states.global_step, stage.end, sampler.describe())
        settings = LoopSettings(
            cfg.seed,
            cfg.accumulation_steps,
            cfg.ckpt_every,
            cfg.keep_n_latest,
            stage.end,
            rank=self.parallel.dp.rank,
            max_skipped_steps=cfg.max_skipped_steps,
            save_masters=True,
            shard_bytes=int(cfg.ckpt_shard_size_gb * 2**30),
        )
        kind = TrainLoop if self.adversary is None else AdversarialLoop
        loop = kind(engine, schedule, self.ema, log, folder, settings, self.states, len(sampler), weights=self.weights)
        step = VAEStep(
            engine.model,
            self.model,
            self.loss,
            self.plan.mixer.on_rank(self.parallel.dp.rank, self.parallel.dp.size),
            self.device,
            self.dtype,
            self.states,
            engine if isinstance(engine, AdversarialEngine) else None,
        )
        # Every stage begins its data at the front; the place in it follows from the micro-steps done in the stage.
        place = self.states.micro_step - stage.start * cfg.accumulation_steps
        loop.run(prefetch(endless(loader, sampler, place), self.device, self.dtype), step, on_step)

    def _inflate(self) -> None:
        """From pictures to videos: kernels then treat each frame as the picture they were trained on."""
        if not self.model.inflate_from_images():
            return
        if self.weights.masters is not None:
            self.weights.masters.load_state_dict({name: p.detach() for name, p in self.model.named_parameters()})
        if self.ema:  # the average's kernels changed meaning with the model's
            self.ema = EMA(self.weights, self.cfg.ema_decay)

    def _engine(self, stage: Stage, log: MetricLog) -> tuple[Engine, Schedule]:
        """Engine and schedule of a stage; those of the discriminator, which go through all stages, are part of it."""
        cfg, done = self.cfg, self.states.global_step - stage.start
        if cfg.freeze_layers == "all":
            assert self.adversary is not None
            return AdversarialEngine(
                self.model, None, self.adversary, cfg.accumulation_steps, log
            ), self.adversary.schedule
        engine = self._wrap(self.model, {**cfg.optim, "lr": stage.lr}, self.weights.masters)
        if self.resume and done and cfg.load_optimizer:
            load_optimizer(engine, self.resume)
            rounded = self.weights.masters is None and engine.rounded_to is not None
            if rounded and is_stored(self.resume / "master.safetensors"):  # not if all weights were frozen
                engine.load_master_state(load_weights(self.resume, "master"))
        schedule = self._schedule(engine.optimizer, stage.lr, cfg.lr_scheduler, stage.steps, done)
        if self.adversary is None:
            return engine, schedule
        return AdversarialEngine(engine.model, engine, self.adversary, cfg.accumulation_steps, log), schedule


@contextmanager
def profiling(enabled: bool, folder: Path) -> Iterator[Callable[[int], None] | None]:
    """Record steps 12 to 31 with torch's profiler, to ``<folder>/profile`` (read by TensorBoard); gives a step hook."""
    if not enabled:
        yield None
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=10, active=20, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "profile")),
    ) as profiler:
        yield lambda _: profiler.step()
