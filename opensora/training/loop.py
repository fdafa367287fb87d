"""The training loop that all trainers share: accumulate, step, average, log, save."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import is_torchelastic_launched

from opensora.acceleration.sharding import Gathered
from opensora.datasets.table import row_number
from opensora.training.checkpoint.content import CheckpointContent
from opensora.training.checkpoint.folder import RunningStates
from opensora.training.checkpoint.writer import SHARD_BYTES, CheckpointWriter
from opensora.training.hooks import Hook
from opensora.training.report.metrics import MetricLog, StageTimer
from opensora.training.roles import MODEL, Role, Turn
from opensora.training.stopping import EXIT_STATUS, StopRequest
from opensora.training.weights.adapters import TrainedWeights
from opensora.training.weights.ema import EMA
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.main import doing

logger = get_logger(__name__)

NAMED_ROWS = 8  # rows listed when a run stops because of its batches


class Losses(Protocol):
    """What a micro-batch is minimised for: one turn per backward pass, the first one usually the model's.

    The graph of a turn is gone when the next one is asked for, so that two never share the memory.
    """

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> Iterator[Turn]:
        """All randomness comes from ``generator``. At least one turn; whether another follows is up to the step."""


@dataclass
class LoopSettings:
    """Numbers of the loop.

    Attributes:
        seed: of everything random.
        accumulation: micro-batches per optimizer step.
        ckpt_every: optimizer steps between checkpoints, 0 for none before the end.
        keep_n_latest: checkpoints to keep, negative for all.
        stop_at: optimizer step that the loop ends at.
        rank: data-parallel place of this process.
        max_skipped_steps: this many steps in a row without a finite loss and gradient stop the run.
        async_io: write checkpoints beside training.
        save_masters: write the fp32 copies of the weights into checkpoints.
        shard_bytes: size of the files that a checkpoint's tensors are divided over.
    """

    seed: int
    accumulation: int
    ckpt_every: int
    keep_n_latest: int
    stop_at: int
    rank: int = 0
    max_skipped_steps: int = 20
    async_io: bool = False
    save_masters: bool = True
    shard_bytes: int = SHARD_BYTES


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
        roles: what trains. The first one's gradient norm and learning rate are the run's. Without ``model`` among them
            that is frozen as a whole.
        weights: of the model: what is averaged and saved.
        ema: averaged weights or None.
        log: where metrics go.
        folder: experiment folder for checkpoints.
        settings: numbers of the loop.
        states: where the run stands; updated in place.
        epoch_length: micro-batches per epoch (for the checkpoint's name).
        metadata: strings for the header of saved weights.
        timer: takes the time of the backward pass and the update.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        weights: TrainedWeights,
        ema: EMA | None,
        log: MetricLog,
        folder: Path,
        settings: LoopSettings,
        states: RunningStates,
        epoch_length: int,
        metadata: dict[str, str] | None = None,
        timer: StageTimer | None = None,
    ) -> None:
        self.roles, self.lead = {role.name: role for role in roles}, roles[0]
        self.weights, self.ema, self.log = weights, ema, log
        self.folder, self.settings, self.states = folder, settings, states
        self.epoch_length, self.metadata = epoch_length, metadata
        ranks = self.lead.engine.ranks
        self.writer = CheckpointWriter(folder, settings.keep_n_latest, settings.async_io, ranks, settings.shard_bytes)
        self.timer = timer or StageTimer(torch.device("cpu"), enabled=False)
        self._skipped_in_a_row = 0
        self._had_turn: set[str] = set()  # roles that the present optimizer step has gradients for

    def run(self, batches: Iterator[dict[str, Any]], losses: Losses, hooks: Sequence[Hook] = ()) -> None:
        """Train until ``stop_at``, with the hooks after every optimizer step.

        Raises:
            UserError: too many steps in a row had no finite gradient (the rows of the batch are named), or the last
                checkpoint could not be written.
            SystemExit: SIGTERM came; the run is saved, the exit status is 143.
        """
        settings = self.settings
        try:
            with StopRequest(is_torchelastic_launched()) as stop:
                while self.states.global_step < settings.stop_at:
                    with doing(f"step {self.states.global_step + 1}"):
                        self._step(batches, losses)
                    self.writer.report()
                    step = self.states.global_step
                    with self.log.paused():
                        for hook in hooks:
                            hook.after_step(step)
                    done, ends = step == settings.stop_at, self.lead.engine.on_any_rank(stop.requested)
                    if done or ends or (settings.ckpt_every and step % settings.ckpt_every == 0):
                        path = self.save(last=done or ends)
                        if ends and not done:
                            if self.lead.engine.ranks.first:
                                logger.warning("ended by SIGTERM after step %d; resume with --load %s", step, path)
                            raise SystemExit(EXIT_STATUS)
        finally:
            self.writer.wait()

    def _step(self, batches: Iterator[dict[str, Any]], losses: Losses) -> None:
        rows = [self._micro_step(batch, losses, i) for i, batch in self._group(batches)]
        self._optimizer_step([row for of_batch in rows for row in of_batch])

    def _group(self, batches: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(self.settings.accumulation):
            start = perf_counter()
            batch = next(batches)
            self.log.add({"data_seconds": perf_counter() - start})
            yield i, batch

    def _micro_step(self, batch: dict[str, Any], losses: Losses, i: int) -> list[str]:
        """Forward and backward of one batch; returns the names of its rows."""
        settings, states = self.settings, self.states
        turns = losses(batch, step_generator(settings.seed, states.micro_step, settings.rank))
        with doing(", ".join(row_names(batch)[:NAMED_ROWS])):
            first = next(turns)
        with self.timer("backward"), ExitStack() as stack:
            if i < settings.accumulation - 1:
                for role in self.roles.values():
                    stack.enter_context(role.engine.no_sync())
            for turn in chain((first,), turns):
                self._backward(turn)
        states.micro_step += 1
        states.epoch, states.step = divmod(states.micro_step, self.epoch_length)
        return row_names(batch)

    def _backward(self, turn: Turn) -> None:
        loss = turn.loss.detach()
        self._had_turn.add(turn.role)
        if turn.role in self.roles:  # otherwise the model, frozen
            # A loss that is not finite makes every gradient NaN, on every rank, and so the step is skipped; a finite
            # one is multiplied by exactly 1. (Looking at the value here would wait for the GPU.)
            self.roles[turn.role].engine.backward(turn.loss * (1 + 0 * loss) / self.settings.accumulation)
        self.log.add({"loss": loss, **turn.metrics} if turn.role == MODEL else turn.metrics)

    def _optimizer_step(self, rows: list[str]) -> None:
        lr = float(self.lead.schedule.get_last_lr()[0])
        waits = MODEL not in self._had_turn and MODEL in self.roles  # for others, which a method trains more often
        stepping = {name: role for name, role in self.roles.items() if not (waits and name == MODEL)}
        self._had_turn.clear()
        with self.timer("update"):
            norms = {name: role.engine.step() for name, role in stepping.items()}
        for role in self.roles.values():
            role.schedule.step()
            if role is not self.lead:
                self._log_norm(role, norms[role.name])
        self.states.global_step += 1
        norm = norms.get(self.lead.name)
        if norm is None:
            pass
        elif math.isfinite(norm):
            self._skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.weights)
            self.log.add({"grad_norm": norm})
        else:
            self._skip(rows)
        self.log.add(self.timer.take())
        self.log.step_done(self.states.global_step, lr)

    def _log_norm(self, role: Role, norm: float) -> None:
        if math.isfinite(norm):
            self.log.add({f"{role.prefix}_grad_norm": norm})
        else:
            logger.warning("the %s's gradient is not finite: its weights are left as they are", role.name)

    def _skip(self, rows: list[str]) -> None:
        """Count a step that left the weights as they are; too many in a row end the run."""
        self._skipped_in_a_row += 1
        self.states.skipped_steps += 1
        names = ", ".join(rows[:NAMED_ROWS]) + (f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else "")
        logger.warning(
            "step %d: loss or gradient is not finite, weights left as they are (%d such steps so far); rows: %s",
            self.states.global_step,
            self.states.skipped_steps,
            names,
        )
        if self._skipped_in_a_row >= self.settings.max_skipped_steps:
            raise UserError(
                f"step {self.states.global_step}: {self._skipped_in_a_row} steps in a row had no finite loss and "
                f"gradient; the last batch held {names}. Lower lr, look at these rows, or resume from an older "
                "checkpoint with --load"
            )

    def content(self) -> CheckpointContent:
        """What a checkpoint of this moment holds; tensors are the run's own, whole ones made when they are read."""
        self.states.ema_updates = self.ema.updates if self.ema is not None else 0
        main, adapter = self.roles.get(MODEL), self.weights.adapter
        others = [role for role in self.roles.values() if role is not main]
        gather = main.engine.gather if main is not None else _as_it_is
        masters = self.settings.save_masters and adapter is None  # adapters are saved in fp32
        saved, rounded_to = gather(self.weights.saved()), main.engine.rounded_to if main is not None else None
        if rounded_to is not None:
            saved = Gathered(saved, lambda name, value: value.to(rounded_to))
        optimizers = {"optimizer": main.engine.state_dict() if main is not None else {}}
        return CheckpointContent(
            self.states,
            saved,
            {**optimizers, **{role.files.optimizer: role.engine.state_dict() for role in others}},
            ema=gather(self.ema.state_dict()) if self.ema is not None else None,
            extra_models={name: weights for role in others for name, weights in role.saved().items()},
            metadata=self.metadata,
            master=main.master_state() or None if main is not None and masters else None,
            write_adapter_config=adapter.write_config if adapter is not None else None,
        )

    def save(self, last: bool = False) -> Path:
        """Write a checkpoint of this moment and drop those past ``keep_n_latest``; see :class:`CheckpointWriter`."""
        return self.writer.save(self.content(), last)


def _as_it_is(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return state


def row_names(batch: Mapping[str, Any]) -> list[str]:
    """Rows of a batch as a user finds them: number in the table (the header is row 1) and file."""
    indices, paths = batch.get("index", []), batch.get("path", [])
    names = [f"row {row_number(i)}" for i in indices] or [""] * len(paths)
    return [f"{name} ({path})" if name else str(path) for name, path in zip(names, paths)] if paths else names
