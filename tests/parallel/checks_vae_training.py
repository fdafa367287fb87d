"""Autoencoder training on several processes beside that on one, discriminator included."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opensora.training.vae.trainer import VAETrainer
from opensora.utils.errors import UserError
from tests.helpers.vae_runs import (
    AUTOENCODER,
    AVERAGE,
    DISCRIMINATOR,
    JUDGE,
    newest,
    tiny_run,
    weights,
    write_clips,
)
from tests.parallel.harness import assert_close


def run(folder: Path, name: str, world_size: int, **changes: Any) -> Path:
    """One run on this many processes; a single one is the first rank, while the others wait."""
    if dist.get_rank() == 0 and not (folder / "clips.csv").is_file():
        write_clips(folder, count=8)
    dist.barrier()
    options = dict(
        exp_name=name,
        discriminator={**DISCRIMINATOR, "dropout": 0.0},
        optim=dict(cls="AdamW", lr=1e-3, eps=1e-4),
        optim_discriminator=dict(cls="AdamW", lr=1e-3, eps=1e-4),
        **changes,
    )
    cfg = tiny_run("dc_ae", str(folder / "clips.csv"), folder / "runs", **options)
    if world_size > 1 or dist.get_rank() == 0:
        VAETrainer(cfg, 0, world_size).run()
    dist.barrier()
    return newest(folder / "runs" / (name or ""))


def two_processes_equal_one_that_accumulates(folder: Path) -> None:
    """Each of two ranks takes every second micro-batch: a process that adds up pairs of them sees the same."""
    one = run(folder, "one", 1, accumulation_steps=2)
    two = run(folder, "two", 2, plugin="ddp")
    a, b = (weights(checkpoint, AUTOENCODER, AVERAGE, JUDGE) for checkpoint in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        if "running" not in key and "num_batches" not in key:  # batch statistics that training does not use
            assert_close(b[key], a[key], key)


def two_processes_go_on_exactly(folder: Path) -> None:
    options: dict[str, Any] = dict(plugin="ddp", mixed_strategy="mixed_video_image", mixed_image_ratio=0.5)
    whole = run(folder, "whole", 2, max_steps=4, ckpt_every=2, **options)
    run(folder, "parts", 2, max_steps=2, **options)
    parts = run(folder, "parts", 2, max_steps=4, load=str(folder / "runs" / "parts"), **options)
    a, b = (weights(checkpoint, AUTOENCODER, AVERAGE, JUDGE) for checkpoint in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a if "running" not in key)


def plugins_that_divide_the_model_are_refused(folder: Path) -> None:
    for changes, message in (
        (dict(plugin="fsdp2"), "dividing the data"),
        (dict(plugin="none"), "dividing the data"),
        (dict(plugin="ddp", plugin_config=dict(tp_size=2)), "dividing the data"),
        (dict(plugin="ddp", image_steps=1, image_bucket_config={"32px_ar1:1": {1: (1.0, 2)}}), "two runs"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, "refused", 2, **changes)


CHECKS = (
    plugins_that_divide_the_model_are_refused,
    two_processes_equal_one_that_accumulates,
    two_processes_go_on_exactly,
)
