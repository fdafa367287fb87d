"""Learning-rate schedules by name: how a rate falls once its plateau ends.

Each is a function of the share of the decay that is done, from 0 to 1; it starts at 1. One of a user's own is
registered with ``SCHEDULES.register("name")`` of :mod:`opensora.config.choices`.
"""

import math

from opensora.config.commands import TrainOptions
from opensora.config.options import SchedulerOptions

WSD = "wsd"


def constant(done: float) -> float:
    """No decay."""
    return 1.0


def cosine(done: float) -> float:
    """Half a cosine (arXiv:1608.03983, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A straight line."""
    return 1.0 - done


def wsd(done: float) -> float:
    """The decay of warmup-stable-decay (arXiv:2404.06395) as ``1 - sqrt`` (arXiv:2405.18392)."""
    return 1.0 - math.sqrt(done)


def schedule_options(cfg: TrainOptions) -> SchedulerOptions:
    """The schedule that the top-level keys of a diffusion training config say."""
    return SchedulerOptions(
        warmup_steps=cfg.warmup_steps,
        name=cfg.lr_schedule,
        cosine=cfg.use_cosine_scheduler,
        flat_share=cfg.flat_share,
        decay_share=cfg.lr_decay_share,
        final_share=cfg.lr_final_share,
    )


def name_of(options: SchedulerOptions) -> str:
    """Which schedule the options choose: a name counts more than ``cosine``."""
    return options.name or ("cosine" if options.cosine else "constant")


def plateau_share(options: SchedulerOptions) -> float:
    """Share of the steps after warm-up before the decay begins."""
    return 1.0 - options.decay_share if name_of(options) == WSD else options.flat_share
