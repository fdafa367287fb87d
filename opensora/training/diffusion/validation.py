"""Validation loss: held-out rows at fixed diffusion times and noise, so that only the model can change it."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from opensora.config.commands import TrainOptions
from opensora.datasets.dataloader import build_train_loader, to_device
from opensora.datasets.source import build_source
from opensora.training.diffusion.cache import source_section
from opensora.training.diffusion.inputs import InputEncoder, InputOptions, diffusion_loss
from opensora.training.loop import step_generator
from opensora.training.report.metrics import MetricLog
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)


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
    if not section.timesteps:
        raise UserError("validation.timesteps=[]: give numbers between 0 and 1")


def single_clip_buckets(bucket_config: Mapping[str, Mapping]) -> dict[str, dict]:
    """The same buckets with one clip per batch and no chance, so that every row of a small table is used."""
    return {resolution: dict.fromkeys(lengths, (1.0, 1)) for resolution, lengths in bucket_config.items()}


class Validation:
    """Loss of a model on held-out rows.

    Args:
        cfg: resolved training config with a section ``validation``.
        options: of the training objective.

    Raises:
        UserError: anything wrong with the table.
    """

    def __init__(self, cfg: TrainOptions, options: InputOptions) -> None:
        section = cfg.validation
        assert section is not None
        assert cfg.bucket_config is not None
        self.every, self.times, self.seed = section.every, list(section.timesteps), section.seed
        source = replace(source_section(cfg), data_path=section.data_path)
        dataset = build_source(source, keep_in_memory=False)
        self.loader, sampler = build_train_loader(
            dataset, single_clip_buckets(cfg.bucket_config), multiple=options.spatial_multiple, seed=self.seed
        )
        self.rows = min(section.max_rows, len(sampler))
        self.options = replace(options, t5_dropout=0.0, clip_dropout=0.0)

    def encoder(self, training: InputEncoder) -> InputEncoder:
        """Encoder for held-out rows, on the same models: no dropout of texts, nothing kept."""
        return InputEncoder(training.ae, training.t5, training.clip, self.options)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, encode: InputEncoder, device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        """``val_loss``, and ``val_loss_time/T`` for each of the times.

        The row's number alone decides on its noise, condition and posterior sample.
        """
        was_training = model.training
        model.eval()
        sums = dict.fromkeys(self.times, 0.0)
        for batch in islice(self.loader, self.rows):
            moved = to_device(batch, device, dtype)
            for t in self.times:
                generator = step_generator(self.seed, int(batch["index"][0]), 0)
                prepared = encode(moved, generator, torch.full((1,), t))
                sums[t] += float(diffusion_loss(model, prepared))
        model.train(was_training)
        means = {f"val_loss_time/{t:g}": total / self.rows for t, total in sums.items()}
        return {"val_loss": sum(means.values()) / len(means), **means}


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
