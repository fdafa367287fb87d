"""Training of the diffusion model."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.acceleration.engine import Engine
from opensora.acceleration.parallel_context import ParallelContext, launch
from opensora.acceleration.plugins import check_training, create_context, create_engine, divide_model, keeps_masters
from opensora.acceleration.rank_zero import from_rank_zero
from opensora.acceleration.shardformer import use_shardformer
from opensora.datasets.dataloader import build_train_loader, endless, prefetch
from opensora.encoded.memory import EncodedMemory
from opensora.models.build import build_on_meta
from opensora.models.mmdit.loading import layout_metadata
from opensora.registry import MODELS, build_module
from opensora.training.checkpoint.folder import RunningStates, find_checkpoint, load_states, load_weights
from opensora.training.checks import check_unfinished
from opensora.training.diffusion.cache import build_dataset, check_cache
from opensora.training.diffusion.checks import check_config, check_resources
from opensora.training.diffusion.encoders import cached_encoders
from opensora.training.diffusion.inputs import InputEncoder
from opensora.training.diffusion.loss import DiffusionLoss
from opensora.training.diffusion.samples import TrainSamples
from opensora.training.diffusion.validation import Validation
from opensora.training.experiment import claimed_experiment, create_experiment, experiment_folder
from opensora.training.loop import LoopSettings, TrainLoop
from opensora.training.report.metrics import MetricLog, StageTimer
from opensora.training.report.profiling import NsightWindow
from opensora.training.report.throughput import TrainingFlops, peak_flops
from opensora.training.report.trackers import create_trackers
from opensora.training.weights.adapters import LoraAdapter, TrainedWeights, freeze, read_adapter, unmap
from opensora.training.weights.ema import EMA
from opensora.training.weights.masters import MasterWeights, optimizer_factory
from opensora.training.weights.optimizer import create_schedule, load_optimizer
from opensora.training.weights.recompute import apply_recompute
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import is_stored

logger = get_logger(__name__)


class Trainer:
    """One training run of the diffusion model, on this process or all that `launch` has joined.

    Args:
        cfg: resolved config (``TrainOptions``).
        local_rank: number of this process on its machine.
        world_size: number of processes.

    Raises:
        UserError: anything wrong with config, table, checkpoint or weight files.
    """

    def __init__(self, cfg: Any, local_rank: int = 0, world_size: int = 1) -> None:
        self.cfg = cfg
        self.options = check_config(cfg)
        self.device, self.dtype = pick_device(cfg.device, local_rank), torch_dtype(cfg.dtype)
        check_training(cfg.plugin, cfg.plugin_config, build_on_meta(cfg.model), world_size)
        _check_parts(cfg, world_size)
        self.parallel = ParallelContext(device=self.device)
        if world_size > 1:
            launch(self.device)
            self.parallel = create_context(cfg.plugin, cfg.plugin_config, self.device)
        self.resume = find_checkpoint(cfg.load, cfg.outputs) if cfg.load else None
        experiment_folder(cfg, self.resume)  # refuses one that is taken
        check_resources(cfg, self.device, self.resume)
        self.states = load_states(self.resume) if self.resume else RunningStates(0, 0, 0, 0)
        self.states.move_to(self.parallel.dp.size)
        self.dataset = build_dataset(cfg)
        check_cache(cfg, self.dataset)
        self.memory = EncodedMemory() if cfg.keep_encoded else None
        self.loader, self.sampler = build_train_loader(
            self.dataset,
            cfg.bucket_config,
            multiple=self.options.spatial_multiple,
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor,
            pin_memory=self.device.type == "cuda",
            num_replicas=self.parallel.dp.size,
            rank=self.parallel.dp.rank,
            same_windows=cfg.keep_encoded,
            is_encoded=self.memory.is_encoded if self.memory is not None else None,
        )
        self.validation = Validation(cfg, self.options) if cfg.validation else None
        self.total_steps = cfg.max_steps or cfg.epochs * len(self.sampler) // cfg.accumulation_steps
        check_unfinished(self.states, self.total_steps)
        self.states.start_at(cfg.start_epoch, cfg.start_step, len(self.sampler))

    def _build(self, section: str, **overrides: Any) -> Any:
        options = {"device_map": str(self.device), "torch_dtype": self.dtype, **overrides}
        return build_module(dict(self.cfg[section]), MODELS, **options)

    def _encoder(self) -> InputEncoder:
        known = cached_encoders(self.cfg, self.dataset, self.device, self.dtype)
        ae, t5, clip = (known[name] if name in known else self._build(name) for name in ("ae", "t5", "clip"))
        use_shardformer(t5)
        if not self.cfg.samples:
            del ae.decoder  # training only encodes
        encoder = InputEncoder(ae.eval().requires_grad_(False), t5, clip, self.options, self.memory)
        if self.cfg.warmup_ae and "ae" not in known:
            self._warm_up(ae)
        return encoder

    @torch.no_grad()
    def _warm_up(self, ae: Any) -> None:
        """Encode every bucket's shape once: kernels are chosen, and memory is seen to suffice, before training."""
        shapes = {(b.batch_size, 3, b.num_frames, b.height, b.width) for b in self.sampler.table.buckets}
        for shape in sorted(shapes):
            ae.encode(torch.zeros(shape, device=self.device, dtype=self.dtype))
        logger.info("autoencoder warmed up on %d shapes", len(shapes))

    def _model(self) -> TrainedWeights:
        """The model, its trained part marked, with the weights of the checkpoint to go on from."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        whole = self.resume is not None and not cfg.lora_config
        overrides = {"from_pretrained": str(self.resume / "model" / "model.safetensors")} if whole else {}  # type: ignore[operator]
        engine_keeps_masters = keeps_masters(cfg.plugin, self.parallel)
        dtype = torch.float32 if engine_keeps_masters else self.dtype
        model = self._build("model", torch_dtype=dtype, **overrides).train()
        adapter = None
        if cfg.lora_config:
            adapter = LoraAdapter(model, cfg.lora_config, self.resume / "lora" if self.resume else cfg.lora_checkpoint)
        else:
            unmap(model)
            freeze(model, cfg.freeze_layers)
        apply_recompute(model, cfg.grad_checkpoint, cfg.grad_ckpt_buffer_size, self.device)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%.2fM parameters, %.2fM of them trained, on %s", total / 1e6, trained / 1e6, self.device)
        self.layout = divide_model(model, self.parallel, cfg.plugin_config, cfg.plugin)
        masters = MasterWeights(model) if dtype != torch.float32 else None
        return TrainedWeights(model, masters, adapter)

    def _engine(self, weights: TrainedWeights) -> Engine:
        cfg, masters = self.cfg, weights.masters
        engine = create_engine(
            cfg.plugin,
            weights.model,
            optimizer_factory(cfg.optim, masters),
            self.parallel,
            max_norm=cfg.grad_clip,
            dtype=self.dtype,
            config=cfg.plugin_config,
            layout=self.layout,
            masters=masters.named_parameters() if masters is not None else None,
        )
        if self.resume:
            self._load_masters(engine, masters, self.resume)
            load_optimizer(engine, self.resume)
            optimizer = engine.optimizer
            wanted = {key: cfg.optim[key] for key in ("lr", "eps") if cfg.optim.get(key) is not None}
            for group in optimizer.param_groups:  # the config's, which may have changed, not the checkpoint's
                group.update({key: value for key, value in wanted.items() if key in group})
                group["initial_lr"] = group["lr"]
        return engine

    def _load_masters(self, engine: Engine, masters: MasterWeights | None, resume: Path) -> None:
        if not self.cfg.load_master_weights or (masters is None and engine.rounded_to is None):
            return
        if not is_stored(resume / "master.safetensors"):
            logger.warning("%s has no master.safetensors: the fp32 weights start from rounded ones", resume)
            return
        state = load_weights(resume, "master")
        engine.load_master_state(state)
        if masters is not None:
            masters.load_state_dict(engine.scatter(state))

    def _schedule(self, engine: Engine) -> Any:
        cfg = self.cfg
        return create_schedule(
            engine.optimizer,
            warmup_steps=cfg.warmup_steps or 0,
            total_steps=self.total_steps,
            cosine=cfg.use_cosine_scheduler,
            flat_share=cfg.flat_share,
            start_step=self.states.global_step,
            **({"initial_lr": cfg.initial_lr} if cfg.initial_lr is not None else {}),
        )

    def _ema(self, weights: TrainedWeights, engine: Engine) -> EMA | None:
        if not self.cfg.ema_decay:
            return None
        ema = EMA(weights, self.cfg.ema_decay)
        if self.resume:
            lora = weights.adapter is not None
            state = read_adapter(self.resume / "lora_ema") if lora else load_weights(self.resume, "ema")
            ema.load_state_dict(engine.scatter(state), self.states.ema_updates)
        return ema

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
        cfg = self.cfg
        encoder = self._encoder()
        weights = self._model()
        model: Any = weights.model
        rank, processes = self.parallel.rank, self.parallel.world_size
        engine = self._engine(weights)
        ema = self._ema(weights, engine)
        schedule = self._schedule(engine)
        from_rank_zero(partial(create_experiment, cfg, self.resume, folder), self.device, rank, processes)
        logger.info("steps %d to %d\n%s", self.states.global_step, self.total_steps, self.sampler.describe())
        log = MetricLog(
            folder,
            self.total_steps,
            self.states.global_step,
            cfg.log_every,
            trackers=create_trackers(cfg, folder, self.states.global_step) if rank == 0 else [],
            peak_flops=peak_flops(self.device, self.dtype),
            device=self.device,
            parallel=self.parallel,
        )
        timer = StageTimer(self.device, cfg.record_time, cfg.record_barrier)
        settings = self._settings()
        loop = TrainLoop(
            engine, schedule, ema, log, folder, settings, self.states, len(self.sampler),
            layout_metadata(model.config), weights, timer,
        )  # fmt: skip
        loss = DiffusionLoss(engine.model, encoder, self.device, self.dtype, TrainingFlops(model), timer)
        try:
            batches = prefetch(endless(self.loader, self.sampler, self.states.micro_step), self.device, self.dtype)
            loop.run(batches, loss, self._on_step(weights, encoder, ema, log, folder))
        finally:
            log.close()

    def _settings(self) -> LoopSettings:
        cfg = self.cfg
        if self.dtype != torch.float32 and not cfg.save_master_weights and not cfg.lora_config:
            logger.warning("save_master_weights is off: a resumed run starts from weights rounded to %s", cfg.dtype)
        return LoopSettings(
            cfg.seed,
            cfg.accumulation_steps,
            cfg.ckpt_every,
            cfg.keep_n_latest,
            self.total_steps,
            rank=self.parallel.dp.rank,
            max_skipped_steps=cfg.max_skipped_steps,
            async_io=cfg.async_io,
            save_masters=cfg.save_master_weights,
            shard_bytes=int(cfg.ckpt_shard_size_gb * 2**30),
        )

    def _on_step(
        self, weights: TrainedWeights, encoder: InputEncoder, ema: EMA | None, log: MetricLog, folder: Path
    ) -> Callable[[int], None]:
        """What happens besides training: validation, samples, a profiler's window."""
        model: nn.Module = weights.model
        validation = self.validation
        held_out = validation.encoder(encoder) if validation is not None else None
        samples = None
        if self.cfg.samples:
            models: dict[str, Any] = {"model": model, "ae": encoder.ae, "t5": encoder.t5, "clip": encoder.clip}
            if self.parallel.rank:  # all ranks take part, the first one keeps what they make
                self._scratch = tempfile.TemporaryDirectory()
                folder = Path(self._scratch.name)
            samples = TrainSamples(self.cfg, models, folder, self.device, self.dtype)
        window = NsightWindow.from_config(self.cfg, self.states.global_step, self.device)

        def on_step(step: int) -> None:
            if window is not None:
                window.on_step(step)
            with log.paused():
                if validation is not None and held_out is not None and step % validation.every == 0:
                    log.record(validation(model, held_out, self.device, self.dtype), step)
                if samples is not None and step % samples.every == 0:
                    if ema is not None and self.cfg.samples["use_ema"]:
                        with ema.shown(weights):
                            samples(step, log)
                    else:
                        samples(step, log)

        return on_step


def _check_parts(cfg: Any, world_size: int) -> None:
    """Raises a UserError for what cannot be divided over processes."""
    if world_size == 1:
        return
    whole = cfg.plugin == "ddp" and (cfg.plugin_config or {}).get("tp_size", 1) == 1
    if cfg.optim.get("cls") == "Muon" and not whole:
        raise UserError(
            "optim.cls=Muon needs whole matrices on every rank: use --plugin ddp, or --optim.cls AdamW under any plugin"
        )
    if cfg.lora_config and not whole:
        raise UserError("lora_config: adapters are trained with whole weights on every rank: use --plugin ddp")
