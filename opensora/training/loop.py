"""The training loop that all trainers share: accumulate, step, average, log, save."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from opensora.acceleration.engine import Engine
from opensora.training.checkpoint import RunningStates, remove_old_checkpoints, save_checkpoint
from opensora.training.ema import EMA
from opensora.training.metrics import MetricLog
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

MAX_BAD_STEPS = 20  # consecutive steps with a non-finite loss or gradient before the run stops


class LossFunction(Protocol):
    """Loss of one micro-batch: a scalar to minimise and numbers to log."""

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """All randomness comes from ``generator``."""


@dataclass
class LoopSettings:
    """Numbers of the loop; ``stop_at`` is the optimizer step this call ends at, ``total`` the whole run's last."""

    seed: int
    accumulation: int
    ckpt_every: int
    keep_n_latest: int
    stop_at: int
    rank: int = 0


def step_generator(seed: int, micro_step: int, rank: int) -> torch.Generator:
    """Generator of a micro-step's noise, timesteps and dropout.

    It depends on the place in the run only, so a resumed run draws what an uninterrupted one would have drawn, and
    data-parallel ranks differ.
    """
    mixed = torch.Generator().manual_seed(seed)
    first = int(torch.randint(2**62, (1,), generator=mixed))
    return torch.Generator().manual_seed((first + micro_step * 1_000_003 + rank * 7_919) % 2**63)


class TrainLoop:
    """Optimizer steps until ``settings.stop_at``.

    Args:
        engine: model and optimizer.
        schedule: learning rate per optimizer step.
        ema: averaged weights or None.
        log: where metrics go.
        folder: experiment folder for checkpoints.
        settings: numbers of the loop.
        states: where the run stands; updated in place.
        epoch_length: micro-batches per epoch (for the checkpoint's name).
        metadata: strings for the header of saved weights.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: LRScheduler,
        ema: EMA | None,
        log: MetricLog,
        folder: Path,
        settings: LoopSettings,
        states: RunningStates,
        epoch_length: int,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.engine, self.schedule, self.ema, self.log = engine, schedule, ema, log
        self.folder, self.settings, self.states = folder, settings, states
        self.epoch_length, self.metadata = epoch_length, metadata
        self._bad_steps = 0

    def run(
        self,
        batches: Iterator[dict[str, Any]],
        loss_function: LossFunction,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """Train until ``stop_at``; ``on_step(global_step)`` is called after every optimizer step."""
        while self.states.global_step < self.settings.stop_at:
            paths = [self._micro_step(next_batch, loss_function, i) for i, next_batch in self._group(batches)]
            self._optimizer_step([path for group in paths for path in group])
            step = self.states.global_step
            if on_step is not None:
                on_step(step)
            every = self.settings.ckpt_every
            if (every and step % every == 0) or step == self.settings.stop_at:
                self.save()

    def _group(self, batches: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(self.settings.accumulation):
            start = perf_counter()
            batch = next(batches)
            self.log.add({"data_seconds": perf_counter() - start})
            yield i, batch

    def _micro_step(self, batch: dict[str, Any], loss_function: LossFunction, i: int) -> list[str]:
        settings, states = self.settings, self.states
        generator = step_generator(settings.seed, states.micro_step, settings.rank)
        loss, metrics = loss_function(batch, generator)
        last = i == settings.accumulation - 1
        if last:
            self.engine.backward(loss / settings.accumulation)
        else:
            with self.engine.no_sync():
                self.engine.backward(loss / settings.accumulation)
        self.log.add({"loss": float(loss.detach()), **metrics})
        states.micro_step += 1
        states.epoch, states.step = divmod(states.micro_step, self.epoch_length)
        return list(batch.get("path", []))

    def _optimizer_step(self, paths: list[str]) -> None:
        lr = float(self.schedule.get_last_lr()[0])
        norm = self.engine.step()
        self.schedule.step()
        self.states.global_step += 1
        if math.isfinite(norm):
            self._bad_steps = 0
            if self.ema is not None:
                self.ema.update(self.engine.unwrap())
        else:
            self._bad_steps += 1
            logger.warning("step %d: gradient is not finite, weights left as they are", self.states.global_step)
            if self._bad_steps >= MAX_BAD_STEPS:
                raise RuntimeError(
                    f"{MAX_BAD_STEPS} steps in a row had no finite gradient; the last batch held {', '.join(paths[:4])}"
                )
        self.log.add({"grad_norm": norm})
        self.log.step_done(self.states.global_step, lr)

    def save(self) -> Path:
        """Write a checkpoint of this moment and drop those past ``keep_n_latest``."""
        self.states.ema_updates = self.ema.updates if self.ema is not None else 0
        path = save_checkpoint(
            self.folder,
            self.states,
            self.engine.unwrap().state_dict(),
            optimizers={"optimizer": self.engine.state_dict()},
            ema=self.ema.state_dict() if self.ema is not None else None,
            metadata=self.metadata,
        )
        remove_old_checkpoints(self.folder, self.settings.keep_n_latest)
        logger.info("saved %s", path)
        return path
