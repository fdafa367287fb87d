"""The start that all trainers share: device, processes, checkpoint to resume, folder, log; and what follows from it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
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
from opensora.config.commands import TrainOptions, VaeTrainOptions
from opensora.config.options import ModelOptions, OptimOptions, SchedulerOptions
from opensora.datasets.dataloader import BucketLoader, build_train_loader
from opensora.datasets.sampler import BucketBatchSampler
from opensora.datasets.source import ClipSource
from opensora.models.quantization.linear import parameter_sizes
from opensora.models.quantization.loading import tell
from opensora.registry import MODELS, build_module
from opensora.training.changes import check_unchanged
from opensora.training.checkpoint.folder import RunningStates, find_checkpoint, load_states, load_weights
from opensora.training.experiment import claimed_experiment, create_experiment, experiment_folder, newest_of_experiment
from opensora.training.loop import LoopSettings
from opensora.training.report.metrics import MetricLog
from opensora.training.report.throughput import peak_flops
from opensora.training.report.trackers import create_trackers
from opensora.training.roles import Role, RoleFiles
from opensora.training.weights.groups import base_lr
from opensora.training.weights.masters import MasterWeights, optimizer_factory
from opensora.training.weights.optimizer import Schedule, create_schedule, load_optimizer
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import is_stored

logger = get_logger(__name__)

EPOCHS = 1000  # of a run that sets neither epochs nor max_steps


class RunComplete(Exception):
    """A run that is to be resumed has nothing left to do.

    Args:
        folder: of the experiment.
        step: optimizer step that it is at.
    """

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"{folder} is complete at step {step}: nothing is left to do")
        self.folder = folder


def _asked(cfg: TrainOptions | VaeTrainOptions) -> str:
    """The flag that chose the checkpoint, for messages."""
    return f"--resume {cfg.resume}" if cfg.resume else f"--load {cfg.load}"


def find_resume(cfg: TrainOptions | VaeTrainOptions) -> Path | None:
    """The checkpoint that a run resumes from, None if it starts from scratch.

    Raises:
        UserError: none is where the config says, or it is of a run with another table or config.
    """
    own = newest_of_experiment(cfg) if cfg.resume else None
    found = own or (find_checkpoint(cfg.load, cfg.outputs) if cfg.load else None)
    if found is not None and (own is not None or cfg.load == "latest"):
        check_unchanged(cfg, found, _asked(cfg))
    if cfg.resume and found is None:
        logger.info("%s: %s/%s has no checkpoint yet, the run starts", _asked(cfg), cfg.outputs, cfg.exp_name)
    return found


@dataclass(frozen=True)
class Run:
    """Where a training run takes place and what it resumes, found out once, before anything is built.

    Attributes:
        cfg: resolved config.
        device, dtype: where and in what models work.
        parallel: all processes.
        resume: checkpoint to resume from.
    """

    cfg: TrainOptions | VaeTrainOptions
    device: torch.device
    dtype: torch.dtype
    parallel: ParallelContext
    resume: Path | None

    @classmethod
    def start(cls, cfg: TrainOptions | VaeTrainOptions, local_rank: int = 0, world_size: int = 1) -> "Run":
        """Join the processes, find the checkpoint and see that the run's folder is free.

        Args:
            cfg: resolved config, checked.
            local_rank: number of this process on its machine.
            world_size: number of processes.

        Raises:
            UserError: no such device, checkpoint or plugin, or a folder that another run has taken.
        """
        device = pick_device(cfg.device, local_rank)
        parallel = ParallelContext(device=device)
        if world_size > 1:
            launch(device)
            parallel = create_context(cfg.plugin, cfg.plugin_config, device)
        resume = find_resume(cfg)
        experiment_folder(cfg, resume)  # refuses one that is taken
        return cls(cfg, device, torch_dtype(cfg.dtype), parallel, resume)

    @cached_property
    def states(self) -> RunningStates:
        """Where the run stands; the loop updates it.

        Raises:
            UserError: the checkpoint is not one of this program's.
        """
        states = RunningStates(0, 0, 0, 0)
        if self.resume is not None:
            states = load_states(self.resume)
            logger.info("%s: resuming %s after step %d", _asked(self.cfg), self.resume, states.global_step)
        states.move_to(self.parallel.dp.size)
        return states

    def last_step(self, steps_in: Callable[[int], int]) -> int:
        """Optimizer step that the run ends at: at ``max_steps`` or after ``epochs``, whichever comes first.

        Args:
            steps_in: optimizer steps of so many epochs.

        Raises:
            UserError: the checkpoint is at this step, or past it.
            RunComplete: the same where ``resume`` asks for what is left to do.
        """
        cfg = self.cfg
        end = cfg.max_steps
        if end is None or cfg.epochs is not None:
            in_epochs = steps_in(EPOCHS if cfg.epochs is None else cfg.epochs)
            if end is not None and in_epochs < end:
                logger.info("epochs=%s end the run at step %d, before max_steps=%d", cfg.epochs, in_epochs, end)
            end = in_epochs if end is None else min(end, in_epochs)
        if end == 0:
            raise UserError(
                f"epochs={cfg.epochs}: that makes no optimizer step of accumulation_steps={cfg.accumulation_steps} "
                "batches; raise epochs, or lower accumulation_steps or the batch sizes in bucket_config"
            )
        if self.resume is not None and cfg.resume and self.states.global_step >= end:
            raise RunComplete(self.resume.parent, self.states.global_step)
        if self.states.global_step >= end:
            raise UserError(
                f"--load: the checkpoint is at step {self.states.global_step}, the run ends at {end}; "
                "raise max_steps or epochs"
            )
        return end

    def loader(
        self, dataset: ClipSource, buckets: dict[str, dict[int, Any]], multiple: int, **options: Any
    ) -> tuple[BucketLoader, BucketBatchSampler]:
        """Loader of this rank's micro-batches, see :func:`opensora.datasets.dataloader.build_train_loader`."""
        cfg = self.cfg
        return build_train_loader(
            dataset,
            buckets,
            multiple=multiple,
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor,
            pin_memory=self.device.type == "cuda",
            num_replicas=self.parallel.dp.size,
            rank=self.parallel.dp.rank,
            as_bytes=True,
            **options,
        )

    @property
    def master_dtype(self) -> torch.dtype:
        """What a module is built in that will train: fp32 if the plugin rounds weights itself."""
        return torch.float32 if keeps_masters(self.cfg.plugin, self.parallel) else self.dtype

    def build(self, section: ModelOptions, **overrides: Any) -> Any:
        """The model of a config section, on the run's device and in its dtype."""
        options = {"device_map": str(self.device), "torch_dtype": self.dtype, **overrides}
        model = build_module(section, MODELS, **options)
        tell(section.type, model, self.device)
        return model

    def masters_of(
        self, module: nn.Module, optim: OptimOptions, rounded_to: torch.dtype | None = None
    ) -> MasterWeights | None:
        """fp32 copies of what trains of a module that was built in :attr:`master_dtype`, where its optimizer keeps its
        states; None where it needs none. ``rounded_to`` as of :class:`MasterWeights`."""
        trains = any(p.requires_grad for p in module.parameters())
        if self.master_dtype == torch.float32 or not trains:
            return None
        return MasterWeights(module, rounded_to, host=optim.states == "host")

    def engine(
        self,
        module: nn.Module,
        optim: OptimOptions,
        masters: MasterWeights | None,
        layout: WeightLayout | None = None,
        adapters: torch.dtype | None = None,
        fill: Callable[[nn.Module], None] | None = None,
    ) -> Engine:
        """Engine of the config's plugin around a module and a new optimizer.

        Args:
            adapters: dtype in which adapters compute, if these alone train.
            layout: how :func:`opensora.acceleration.plugins.divide_model` has divided the module; None leaves it whole.
            fill: see :func:`opensora.acceleration.plugins.create_engine`.
        """
        cfg = self.cfg
        return create_engine(
            cfg.plugin,
            module,
            optimizer_factory(optim, masters),
            self.parallel,
            max_norm=cfg.grad_clip,
            dtype=self.dtype if adapters is None else adapters,
            adapters=adapters is not None,
            config=cfg.plugin_config,
            layout=WeightLayout() if layout is None else layout,
            masters=masters.named_parameters() if masters is not None else None,
            in_backward=optim.in_backward,
            fill=fill,
        )

    def schedule(
        self,
        optimizer: Optimizer,
        options: SchedulerOptions,
        total: int,
        start: int,
        optim: OptimOptions | None = None,
    ) -> Schedule:
        """Learning rates of an optimizer that is at step ``start`` of ``total``.

        Args:
            optim: its learning rates hold whatever the checkpoint says; None leaves the optimizer's.
        """
        if optim is not None:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = base_lr(group, optim)
        return create_schedule(
            optimizer,
            options,
            total_steps=total,
            start_step=start,
            **({} if self.cfg.initial_lr is None else {"initial_lr": self.cfg.initial_lr}),
        )

    def role(
        self,
        name: str,
        module: nn.Module,
        optim: OptimOptions,
        make_schedule: Callable[[Optimizer], Schedule],
        *,
        prefix: str = "",
        anew: bool = False,
        load_optimizer_state: bool = True,
    ) -> Role:
        """Put a module besides the model into training, as the checkpoint has it if it does.

        Args:
            name, prefix: see :class:`opensora.training.roles.Role`.
            module: built in :attr:`master_dtype`, on the device; the same on every rank.
            optim: its optimizer.
            make_schedule: from that to its learning rates.
            anew: leave what the checkpoint has.
            load_optimizer_state: resume the optimizer's state, too.
        """
        files = RoleFiles.of(name, prefix or name)
        past = None if anew else self.past_of(name)
        if past is not None:
            module.load_state_dict(load_weights(past, files.weights))
        masters = self.masters_of(module, optim)
        stored = load_weights(past, files.masters) if past is not None and (past / files.masters).is_dir() else None
        if stored is not None and masters is not None:
            masters.load_state_dict(stored)
        engine = self.engine(module, optim, masters)
        if stored is not None and masters is None:
            engine.load_master_state(stored)
        if past is not None and load_optimizer_state:
            load_optimizer(engine, past, files.optimizer)
        return Role(name, engine, make_schedule(engine.optimizer), masters, prefix)

    def past_of(self, name: str) -> Path | None:
        """The checkpoint to resume, if it holds the role."""
        return self.resume if self.resume is not None and (self.resume / name).is_dir() else None

    def load_masters(self, engine: Engine, masters: MasterWeights | None) -> bool:
        """Resume the model's fp32 weights; false where the checkpoint has none."""
        if self.resume is None or not is_stored(self.resume / "master.safetensors"):
            return False
        state = load_weights(self.resume, "master")
        engine.load_master_state(state)
        if masters is not None:
            masters.load_state_dict(engine.scatter(state))
        return True

    def claimed_folder(self) -> AbstractContextManager[Path]:
        """The experiment's folder, into which no other process writes meanwhile."""
        return claimed_experiment(self.cfg, self.resume, self.parallel)

    def open_log(self, folder: Path, total_steps: int) -> MetricLog:
        """Write the config into the experiment's folder, on the first rank, and start the log of metrics, on all."""
        cfg, first = self.cfg, self.parallel.rank == 0
        start = partial(create_experiment, cfg, self.resume, folder)
        from_rank_zero(start, self.device, self.parallel.rank, self.parallel.world_size)
        return MetricLog(
            folder,
            total_steps,
            self.states.global_step,
            cfg.log_every,
            trackers=create_trackers(cfg, folder, self.states.global_step) if first else [],
            peak_flops=peak_flops(self.device, self.dtype),
            device=self.device,
            parallel=self.parallel,
        )

    def settings(self, stop_at: int, *, async_io: bool = False, save_masters: bool = True) -> LoopSettings:
        """Numbers of a loop that ends at optimizer step ``stop_at``."""
        cfg = self.cfg
        return LoopSettings(
            cfg.seed,
            cfg.accumulation_steps,
            cfg.ckpt_every,
            cfg.keep_n_latest,
            stop_at,
            rank=self.parallel.dp.rank,
            max_skipped_steps=cfg.max_skipped_steps,
            async_io=async_io,
            save_masters=save_masters,
            shard_bytes=int(cfg.ckpt_shard_size_gb * 2**30),
        )


def log_data(sampler: BucketBatchSampler, steps: str) -> None:
    """Say which steps are to be done on which rows, and what a user should know of these."""
    if sampler.notice:
        logger.warning("%s", sampler.notice)
    logger.info("%s\n%s", steps, sampler.describe())


def log_size(module: nn.Module, what: str, device: torch.device) -> None:
    """Say how many parameters a module has, and how many of them train."""
    sizes = [*parameter_sizes(module)]
    total, trained = sum(p.numel for p in sizes), sum(p.numel for p in sizes if p.trains)
    logger.info("%s: %.2fM parameters, %.2fM of them trained, on %s", what, total / 1e6, trained / 1e6, device)
