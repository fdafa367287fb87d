"""Validation loss: held-out rows at fixed diffusion times and noise, so that only the model can change it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from math import sqrt
from typing import Any

import torch
from torch import nn

from opensora.acceleration.collectives import gather_values
from opensora.acceleration.parallel_context import Axis
from opensora.config.commands import TrainOptions
from opensora.datasets.dataloader import BucketLoader, build_train_loader, to_device
from opensora.datasets.dataset import collate
from opensora.datasets.source import build_source
from opensora.training.diffusion.cache import source_section
from opensora.training.diffusion.inputs import InputEncoder, InputOptions, diffusion_loss
from opensora.training.diffusion.sharing import own_rows
from opensora.training.loop import step_generator
from opensora.training.report.metrics import MetricLog
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

GOLDEN = (sqrt(5) - 1) / 2  # multiples of it spread evenly over [0, 1), however many there are

OfRow = tuple[float, str | None]
"""A loss, and the condition that it was measured with."""


def check_validation(cfg: TrainOptions) -> None:
    """See that the section ``validation`` makes sense.

    Raises:
        UserError: names the key.
    """
    section = cfg.validation
    if not section:
        return
    if not section.data_path:
        raise UserError("validation.data_path is not set: give a table of rows that training does not see")
    if cfg.dataset is not None and section.data_path == cfg.dataset.data_path:
        raise UserError(f"validation.data_path {section.data_path}: this is the training table; hold some rows out")
    if section.bins is not None and "timesteps" in section.given:
        raise UserError("validation.bins and validation.timesteps: both say at which times; set one")
    if not section.timesteps:
        raise UserError("validation.timesteps=[]: give numbers between 0 and 1")


def single_clip_buckets(bucket_config: Mapping[str, Mapping]) -> dict[str, dict]:
    """The same buckets with one clip per batch and no chance, so that every row of a small table is used."""
    return {resolution: dict.fromkeys(lengths, (1.0, 1)) for resolution, lengths in bucket_config.items()}


class RowTimes:
    """Diffusion times of held-out rows: the same for all, or one in each part of the time by the row's number.

    Args:
        times: of every row.
        bins: number of equal parts instead; over many rows their mean losses are means over all times of the part.
    """

    def __init__(self, times: list[float], bins: int | None = None) -> None:
        self._times, self._bins = times, bins
        edges = [number / (bins or 1) for number in range((bins or 0) + 1)]
        self.names = [f"{a:.3g}-{b:.3g}" for a, b in pairwise(edges)] if bins else [f"{t:g}" for t in times]

    def of(self, row: int) -> list[float]:
        """Times of a row, in (0, 1), in the order of ``names``."""
        if not self._bins:
            return self._times
        place = ((row + 1) * GOLDEN) % 1
        return [(number + place) / self._bins for number in range(self._bins)]


class Validation:
    """Loss of a model on held-out rows, which data-parallel ranks divide among them; the numbers are those of one.

    Args:
        cfg: resolved training config with a section ``validation``.
        options: of the training objective.
        ranks: data-parallel ones. All of them work on as many rows, since weights may be divided over them; the last
            row fills up.

    Raises:
        UserError: anything wrong with the table.
    """

    def __init__(self, cfg: TrainOptions, options: InputOptions, ranks: Axis | None = None) -> None:
        section = cfg.validation
        assert section is not None
        assert cfg.bucket_config is not None
        self.every, self.seed = section.every, section.seed
        self.times = RowTimes(list(section.timesteps), section.bins)
        source = replace(source_section(cfg), data_path=section.data_path)
        dataset = build_source(source, keep_in_memory=False)
        buckets, self.ranks = single_clip_buckets(cfg.bucket_config), ranks or Axis()
        sampler = build_train_loader(dataset, buckets, multiple=options.spatial_multiple, seed=self.seed)[1]
        self.rows = min(section.max_rows, len(sampler))
        keys = [*islice(sampler, self.rows)]
        self.own = own_rows(self.rows, self.ranks)
        self.loader = BucketLoader(dataset, batch_sampler=[keys[row] for row in self.own], collate_fn=collate)
        self.options = replace(options, t5_dropout=0.0, clip_dropout=0.0)

    def encoder(self, training: InputEncoder) -> InputEncoder:
        """Encoder for held-out rows, on the same models: no dropout of texts, nothing kept."""
        return training.with_options(self.options)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, encode: InputEncoder, device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        """``val_loss``, ``val_loss_time/T`` for each of the times or parts of it, and ``val_loss_condition/NAME`` for
        each condition that rows drew, where there are any.

        The row's number alone decides on its times, noise, condition and posterior sample.
        """
        was_training = model.training
        model.eval()
        own = {}
        for row, batch in zip(self.own, self.loader):
            moved = to_device(batch, device, dtype)
            own[row] = [self._loss(model, encode, moved, t) for t in self.times.of(int(batch["index"][0]))]
        model.train(was_training)
        found = self._of_all_ranks(own)
        losses = {row: [loss for loss, _ in of_row] for row, of_row in found.items()}
        sums = [sum(losses[row][place] for row in range(self.rows)) for place in range(len(self.times.names))]
        means = {f"val_loss_time/{name}": total / self.rows for name, total in zip(self.times.names, sums)}
        return {"val_loss": sum(means.values()) / len(means), **means, **_by_condition(found.values())}

    def _loss(self, model: nn.Module, encode: InputEncoder, batch: dict[str, Any], t: float) -> OfRow:
        """Loss of a row, and the condition that it draws (None without any)."""
        generator = step_generator(self.seed, int(batch["index"][0]), 0)
        prepared = encode(batch, generator, torch.full((1,), t))
        types = prepared["conditions"]
        return float(diffusion_loss(model, prepared)), types[0] if types else None

    def _of_all_ranks(self, own: dict[int, list[OfRow]]) -> dict[int, list[OfRow]]:
        """Losses of all rows by place, and every rank knows which rows could not be read."""
        losses: dict[int, list[OfRow]] = {}
        broken: dict[int, str] = {}
        for theirs, reasons in gather_values((own, self.loader.broken.reasons), self.ranks):
            losses |= theirs
            broken |= reasons
        self.loader.broken.check({"broken": [*broken.items()]})
        return losses


def _by_condition(rows: Iterable[list[OfRow]]) -> dict[str, float]:
    """Mean loss of each condition."""
    losses = defaultdict[str, list[float]](list)
    for loss, name in (each for of_row in rows for each in of_row):
        if name is not None:
            losses[name].append(loss)
    return {f"val_loss_condition/{name}": sum(losses[name]) / len(losses[name]) for name in sorted(losses)}


class ValidationHook:
    """Validates every so many optimizer steps and logs the losses.

    Args:
        validation: of the config.
        model: what is measured.
        training: encoder of the training clips, whose models it shares.
        device, dtype: where and in what they work.
        log: takes the losses.
    """

    def __init__(
        self,
        validation: Validation,
        model: nn.Module,
        training: InputEncoder,
        device: torch.device,
        dtype: torch.dtype,
        log: MetricLog,
    ) -> None:
        self.validation, self.model, self.log = validation, model, log
        self.encode, self.device, self.dtype = validation.encoder(training), device, dtype

    def after_step(self, step: int) -> None:
        if step % self.validation.every == 0:
            self.log.record(self.validation(self.model, self.encode, self.device, self.dtype), step)

    def close(self) -> None:
        """Nothing is held."""
