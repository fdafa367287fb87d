"""Training of the diffusion model."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.acceleration.compile import check_compiler, compile_and_tell
from opensora.acceleration.devices import torch_dtype
from opensora.acceleration.engine import Engine
from opensora.acceleration.materialise import materialise
from opensora.acceleration.plugins import divide_model
from opensora.acceleration.shardformer import use_shardformer
from opensora.acceleration.streaming import streamed
from opensora.config.commands import TrainOptions
from opensora.datasets.dataloader import endless, prefetch
from opensora.diffusion.trained import conditions_metadata
from opensora.encoded.memory import EncodedMemory, HostRoom
from opensora.models.diffusion import as_diffusion_model
from opensora.models.quantization.loading import kind_of_section
from opensora.training.checkpoint.folder import load_weights
from opensora.training.diffusion.cache import build_dataset, check_cache
from opensora.training.diffusion.checks import check_config, check_resources
from opensora.training.diffusion.encoders import cached_encoders
from opensora.training.diffusion.inputs import InputEncoder
from opensora.training.diffusion.samples import SamplesHook
from opensora.training.diffusion.sharing import ClipEncoder, encode_room
from opensora.training.diffusion.validation import Validation, ValidationHook
from opensora.training.hooks import Hook
from opensora.training.loop import LoopSettings, TrainLoop
from opensora.training.methods.base import METHOD_SEED, MethodContext, TrainingMethod
from opensora.training.report.metrics import MetricLog, StageTimer
from opensora.training.report.profiling import NsightWindow
from opensora.training.roles import MODEL, Role
from opensora.training.run import Run, log_data, log_size
from opensora.training.weights.adapters import LoraAdapter, TrainedWeights, copy_from_mmap, freeze, read_adapter
from opensora.training.weights.ema import EMA
from opensora.training.weights.optimizer import load_optimizer
from opensora.training.weights.recompute import apply_recompute
from opensora.training.weights.schedules import schedule_options
from opensora.utils.logging import get_logger
from opensora.utils.sizes import parse_bytes

logger = get_logger(__name__)


class Trainer:
    """One training run of the diffusion model, on this process or all that torchrun has started.

    Args:
        cfg: resolved config.
        local_rank: number of this process on its machine.
        world_size: number of processes.

    Raises:
        UserError: anything wrong with config, table, checkpoint or weight files.
    """

    def __init__(self, cfg: TrainOptions, local_rank: int = 0, world_size: int = 1) -> None:
        self.cfg = cfg
        self.plan = check_config(cfg, world_size)
        self.start = Run.start(cfg, local_rank, world_size)
        check_resources(cfg, self.plan.model, self.plan.ae, self.start.device, self.start.resume)
        if cfg.compile:
            check_compiler(self.start.device)
        self.dataset = build_dataset(cfg)
        check_cache(cfg, self.dataset, self.plan.ae)
        room = HostRoom(parse_bytes(cfg.keep_encoded_memory, "keep_encoded_memory"))
        self.memory = EncodedMemory(room, self.start.device) if cfg.keep_encoded else None
        self.loader, self.sampler = self.start.loader(
            self.dataset,
            cfg.bucket_config or {},
            self.plan.inputs.spatial_multiple,
            same_windows=cfg.keep_encoded,
            is_encoded=self.memory.is_encoded if self.memory is not None else None,
        )
        self.validation = Validation(cfg, self.plan.inputs, self.start.parallel.dp) if cfg.validation else None
        length = len(self.sampler)
        self.total_steps = self.start.last_step(lambda epochs: epochs * length // cfg.accumulation_steps)
        self.start.states.start_at(cfg.start_epoch, cfg.start_step, length)

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
        with ExitStack() as stack:
            self._train(folder, stack)

    def _train(self, folder: Path, stack: ExitStack) -> None:
        start, cfg = self.start, self.cfg
        encoder = self._encoder()
        weights = self._model(stack)
        plain: Any = weights.model
        model = self._role(weights)
        ema = self._ema(weights, model.engine)
        timer = StageTimer(start.device, cfg.record_time, cfg.record_barrier)
        method = self._method(model.engine, weights, encoder, timer)
        log = start.open_log(folder, self.total_steps)
        log_data(self.sampler, f"steps {start.states.global_step} to {self.total_steps}")
        stack.callback(log.close)
        hooks = self._hooks(weights, encoder, ema, log, folder, method.metadata())
        for hook in hooks:
            stack.callback(hook.close)
        loop = TrainLoop(
            [model, *method.roles], weights, ema, log, folder, self._settings(), start.states, len(self.sampler),
            {**plain.file_metadata(), **conditions_metadata(self.cfg.condition_config), **method.metadata()}, timer,
        )  # fmt: skip
        batches = endless(self.loader, self.sampler, start.states.micro_step)
        loop.run(prefetch(batches, start.device, start.dtype), method, hooks)

    def _build(self, section: str, **overrides: Any) -> Any:
        return self.start.build(getattr(self.cfg, section), **overrides)

    def _encoder(self) -> InputEncoder:
        cfg, start = self.cfg, self.start
        known = cached_encoders(cfg, self.dataset, start.device, start.dtype, self.plan.ae)
        ae, t5, clip = (known[name] if name in known else self._build(name) for name in ("ae", "t5", "clip"))
        use_shardformer(t5)
        if not cfg.samples:
            ae.forget_decoder()  # training only encodes
        axis = start.parallel.sample
        clips = ClipEncoder(ae.eval().requires_grad_(False), axis, encode_room(cfg.encode_memory, start.device))
        if cfg.warmup_ae and "ae" not in known:
            self._warm_up(clips)
        return InputEncoder(ae, t5, clip, self.plan.inputs, self.memory, clips, axis)

    def _warm_up(self, encode: ClipEncoder) -> None:
        """Encode every bucket's shape once: kernels are chosen, and memory is seen to suffice, before training."""
        shapes = {(b.batch_size, 3, b.num_frames, b.height, b.width) for b in self.sampler.table.buckets}
        for shape in sorted(shapes):
            encode(torch.zeros(shape, device=self.start.device, dtype=self.start.dtype))
        logger.info("autoencoder warmed up on %d shapes", len(shapes))

    def _model(self, stack: ExitStack) -> TrainedWeights:
        """The model, its trained part marked, with the weights of the checkpoint to resume from."""
        cfg, start = self.cfg, self.start
        model = self._whole_model("meta" if self._is_divided_empty else None).train()
        adapter = None
        if cfg.lora_config:
            past = start.resume / "lora" if start.resume is not None else cfg.lora_checkpoint
            adapter = LoraAdapter(model, cfg.lora_config, past)
        else:
            copy_from_mmap(model)
            freeze(model, cfg.freeze_layers)
        apply_recompute(model, cfg.grad_checkpoint, cfg.grad_ckpt_buffer_size, start.device)
        log_size(model, "model", start.device)
        self.layout = divide_model(model, start.parallel, cfg.plugin_config, cfg.plugin)
        if self._is_divided_empty and cfg.plugin != "fsdp2":
            self._fill(model)
        if cfg.compile:
            compile_and_tell(model, "model")
        if cfg.weights_memory:
            room, blocks = parse_bytes(cfg.weights_memory, "weights_memory"), model.blocks_in_order()
            stack.enter_context(streamed(model, blocks, start.device, room, trains=True))
        return TrainedWeights(model, start.masters_of(model, cfg.optim, self._rounded_adapters()), adapter)

    @property
    def _is_divided_empty(self) -> bool:
        """Whether the model is divided before it has weights, so that no process ever holds all of them."""
        cfg, parallel = self.cfg, self.start.parallel
        divided = cfg.plugin == "fsdp2" or (cfg.plugin == "ddp" and parallel.tp.size > 1)
        return parallel.world_size > 1 and divided and not cfg.lora_config

    def _whole_model(self, device: str | None = None) -> Any:
        """The model as it begins. Frozen weights under adapters lie in host memory where fsdp2 is to divide them, which
        takes them to the device block by block."""
        cfg, start = self.cfg, self.start
        torch.manual_seed(cfg.seed)
        frozen = bool(cfg.lora_config)  # and so of the dtype that it computes in
        taken_later = frozen and cfg.plugin == "fsdp2" and kind_of_section(cfg.model) is None
        if cfg.weights_memory or (taken_later and start.parallel.world_size > 1):
            device = "cpu"
        overrides = {} if device is None else {"device_map": device}
        if start.resume is not None and not frozen:
            overrides["from_pretrained"] = str(start.resume / "model" / "model.safetensors")
        with torch.device(device) if device == "meta" else nullcontext():
            return self._build("model", torch_dtype=start.dtype if frozen else start.master_dtype, **overrides)

    def _fill(self, model: nn.Module) -> None:
        """Give the divided model its weights."""
        materialise(model, self.layout, self.start.parallel, lambda: self._whole_model("cpu"))

    def _adapters_dtype(self) -> torch.dtype | None:
        """What adapters compute in; None without."""
        return torch_dtype(self.cfg.lora_dtype) if self.cfg.lora_config else None

    def _rounded_adapters(self) -> torch.dtype | None:
        dtype = self._adapters_dtype()
        return None if dtype == torch.float32 else dtype

    def _role(self, weights: TrainedWeights) -> Role:
        """The model in training: its engine, as the checkpoint has it, and its schedule."""
        cfg, start = self.cfg, self.start
        fill = self._fill if self._is_divided_empty and cfg.plugin == "fsdp2" else None
        engine = start.engine(weights.model, cfg.optim, weights.masters, self.layout, self._adapters_dtype(), fill)
        if start.resume is not None:
            rounded = weights.masters is not None or engine.rounded_to is not None
            exact = rounded and weights.adapter is None  # adapters are saved in fp32
            if cfg.load_master_weights and exact and not start.load_masters(engine, weights.masters):
                logger.warning("%s has no master.safetensors: the fp32 weights start from rounded ones", start.resume)
            load_optimizer(engine, start.resume)
            wanted = {"eps": cfg.optim.eps} if "eps" in cfg.optim.given else {}
            for group in engine.optimizer.param_groups:  # the config's, which may have changed, not the checkpoint's
                group.update({key: value for key, value in wanted.items() if key in group})
        schedule = start.schedule(
            engine.optimizer, schedule_options(cfg), self.total_steps, start.states.global_step, cfg.optim
        )
        return Role(MODEL, engine, schedule, weights.masters)

    def _ema(self, weights: TrainedWeights, engine: Engine) -> EMA | None:
        resume = self.start.resume
        if not self.cfg.ema_decay:
            return None
        ema = EMA(weights, self.cfg.ema_decay, self.start.parallel.replica, self.start.device)
        if resume is not None:
            state = read_adapter(resume / "lora_ema") if weights.adapter is not None else load_weights(resume, "ema")
            like = ema.state_dict() if weights.adapter is not None else None
            ema.load_state_dict(engine.scatter(state, like), self.start.states.ema_updates)
        return ema

    def _method(
        self, engine: Engine, weights: TrainedWeights, encoder: InputEncoder, timer: StageTimer
    ) -> TrainingMethod:
        context = MethodContext(
            self.cfg, self.plan.method_options, self.start, engine.model, as_diffusion_model(weights.model), encoder,
            timer, self.total_steps,
        )  # fmt: skip
        device = self.start.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.cfg.seed + METHOD_SEED)
            return self.plan.method(context)

    def _settings(self) -> LoopSettings:
        cfg = self.cfg
        if self.start.dtype != torch.float32 and not cfg.save_master_weights and not cfg.lora_config:
            logger.warning("save_master_weights is off: a resumed run starts from weights rounded to %s", cfg.dtype)
        return self.start.settings(self.total_steps, async_io=cfg.async_io, save_masters=cfg.save_master_weights)

    def _hooks(
        self, weights: TrainedWeights, encoder: InputEncoder, ema: EMA | None, log: MetricLog, folder: Path,
        metadata: dict[str, str],
    ) -> list[Hook]:  # fmt: skip
        """What happens besides training, in this order."""
        cfg, start, samples = self.cfg, self.start, self.plan.samples
        hooks: list[Hook] = []
        window = NsightWindow.from_config(cfg, start.states.global_step, start.device)
        if window is not None:
            hooks.append(window)
        if self.validation is not None:
            hooks.append(ValidationHook(self.validation, weights.model, encoder, start.device, start.dtype, log))
        if cfg.samples is not None and samples is not None:
            hooks.append(SamplesHook(cfg.samples, samples, weights, encoder, ema, folder, start, log, metadata))
        return hooks
