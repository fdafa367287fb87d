"""Checks of a run of prompts over several processes, for :class:`tests.parallel.harness.Group`."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opensora.acceleration.torchrun import Torchrun
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.generation.run import generate
from opensora.utils.errors import UserError
from tests.conftest import tiny_inference_config

TEXTS = ("a", "b", "c")


def config(folder: Path, **overrides: Any) -> Any:
    """Three prompts of the tiny model, one step each."""
    if dist.get_rank() == 0:
        with (folder / "list.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    dist.barrier()
    common = {"dataset.data_path": str(folder / "list.csv"), "num_steps": 2, "save_latents": True}
    return load_config(
        tiny_inference_config(), InferenceOptions, {**common, "save_dir": str(folder / "samples"), **overrides}
    )


def run(cfg: Any, world_size: int = 2, environment: Mapping[str, str] | None = None) -> list[Path]:
    """What this rank made, once all ranks are done."""
    processes = Torchrun(dist.get_rank(), world_size=world_size) if world_size > 1 else None
    made = generate(cfg, torch.device("cpu"), processes, environment, log=lambda line: None)
    if world_size > 1:
        dist.barrier()
    return made


def each_prompt_is_made_once(folder: Path) -> None:
    """The ranks divide the prompts, and latents are those of a single process."""
    made = run(config(folder))
    assert [path.name for path in made] == [["list_0000.mp4", "list_0002.mp4"], ["list_0001.mp4"]][dist.get_rank()]
    alone = run(config(folder, save_dir=str(folder / f"alone{dist.get_rank()}"), batch_size=3), world_size=1)
    assert len(alone) == len(TEXTS)
    for path in alone:
        name = path.with_suffix(".latents.safetensors").name
        pair = [load_file(where / name)["latents"] for where in (path.parent, made[0].parent)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-4)


def one_rank_asks_the_language_model(folder: Path) -> None:
    """Every rank makes its videos from what rank 0 was told, each prompt asked about once."""
    asked = folder / f"asked{dist.get_rank()}"

    def ask(instructions: str, text: str, picture: Any, max_tokens: int) -> str:
        with asked.open("a") as file:
            file.write(text)
        return f"A better {text}"

    with mock.patch("opensora.generation.run.make_asker", return_value=lambda: ask):
        made = run(config(folder, refine_prompt=True, num_sample=2))
    for path in made:
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["text"] == f"A better {record['prompt']}. 8 FPS."
    assert (folder / "asked0").read_text() == "abc"
    assert not (folder / "asked1").exists()


def a_refusal_reaches_every_rank(folder: Path) -> None:
    """Files in the way are seen by rank 0; the other does not wait for it for ever."""
    cfg = config(folder, num_steps=1)
    run(cfg)
    with pytest.raises(UserError, match="is there already"):
        run(cfg)


CHECKS = [each_prompt_is_made_once, one_rank_asks_the_language_model, a_refusal_reaches_every_rank]
