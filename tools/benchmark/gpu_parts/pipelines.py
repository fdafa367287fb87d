"""Whole pipelines from prompt to frames, as they are and held to less memory than the card has."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from opensora.acceleration.compile import compile_blocks
from opensora.benchmark.inference import build_pipeline
from opensora.benchmark.measuring import peak_of
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.cards import CARDS
from opensora.diffusion.loading import park_modulation
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.generation.estimate import Estimate, Way
from opensora.models.diffusion import as_diffusion_model
from opensora.models.mmdit.loading import quantization
from opensora.models.text.files import quantization as text_quantization
from tools.benchmark.gpu_parts.bench import GIB, Bench, Row, memory_cap, room_of
from tools.benchmark.hardware import CONFIG, ROOT

TOY_CONFIG = "configs/diffusion/inference/demo.py"
TOY_KEYS = {"num_steps": 2, "num_frames": 9, "resolution": "32px", "aspect_ratio": "1:1"}
# what is added to the command of 256px text to video; the first that is measured, seconds on an H100
PIPELINES: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "256px t2v": ({}, 40),
    "256px t2v, --step-cache 0.1": ({"step_cache": 0.1}, 25),
    "256px i2v": ({"cond_type": "i2v_head"}, 50),
    "256px t2v, --compile True": ({"compile": True}, 70),
}
CAPPED_STEPS = 10


class Models:
    """The models of all pipelines, built on the device one by one; in the machine's memory, where some will be held to
    less than the card has."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.kinds: dict[str, str] = {}
        self.compiled = False

    def config(self, **keys: Any) -> InferenceOptions:
        """Config of a run with random weights."""
        bench = self.bench
        base = TOY_CONFIG if bench.toy else CONFIG
        common = {"device": bench.device.type, "seed": 1, "sampling_option.seed": 1, **(TOY_KEYS if bench.toy else {})}
        if bench.toy:
            common["dtype"] = "fp32"
        return load_config(ROOT / base, InferenceOptions, {**common, **keys})

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """By name."""
        cfg = self.config(offload=bool(self.bench.caps))
        return build_pipeline(cfg, self.bench.device, random_weights=True).models

    def quantize(self, way: Way) -> None:
        """Have the weights that a way asks for, quantised on the card; for the last runs."""
        kinds = {name: kind for name in ("model", "t5") if (kind := way.kind_of(name)) is not None}
        if kinds == self.kinds:
            return
        if self.kinds:  # of other kinds
            del self.models
        for name, kind in kinds.items():
            model = self.models[name].to(self.bench.device)
            if name == "model":
                quantization(kind).replace_filled(model)
            else:
                text_quantization(kind).replace_filled(model.get_submodule("encoder"))
            model.to("cpu")
        self.kinds = kinds
        self.bench.clear()

    def pipeline(self, cfg: InferenceOptions) -> VideoPipeline:
        """The pipeline of a config; models whose blocks are compiled are not used again without."""
        if self.compiled and not cfg.compile:
            del self.models
        if cfg.compile and not self.compiled:
            model = as_diffusion_model(self.models["model"])
            compile_blocks(model, "aot_eager" if self.bench.toy else "inductor")
        self.compiled = cfg.compile
        run = PreparedRun.of(cfg, self.bench.device)
        home = torch.device("cpu") if cfg.offload else self.bench.device
        for each in self.models.values():
            each.to(home)
        if cfg.precompute:
            park_modulation(self.models["model"])  # as where weights are loaded
        return VideoPipeline(self.models, cfg, self.bench.device, run.dtype)


def video_row(bench: Bench, pipe: VideoPipeline) -> Row:
    """Seconds by stage and the most memory of one video."""
    picture = np.full((256, 256, 3), 128, np.uint8)
    given: dict[str, Any] = {} if pipe.cfg.cond_type == "t2v" else {"ref": picture}
    before = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    with peak_of(bench.device) as peak:
        result = pipe("raining, sea", **given)
    stages = {f"{stage}_s": round(seconds, 2) for stage, seconds in result.timings.items()}
    row = {"steps": result.plan.num_steps, "total_s": sum(result.timings.values()), **stages}
    return {**row, "peak_gib": (before + peak[0]) / GIB, **({"tiles": result.tiles} if result.tiles else {})}


def tried(bench: Bench, models: Models, keys: Mapping[str, Any]) -> Row:
    """The row of a config, or why there is none."""
    try:
        return video_row(bench, models.pipeline(models.config(**keys)))
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    except Exception as error:
        return {"note": f"left out: {type(error).__name__}: {str(error).splitlines()[0][:80]}"}
    finally:
        bench.clear()


def pipeline_rows(bench: Bench, models: Models) -> Iterator[Row]:
    """All stages with all models on the card."""
    known = {key.name for key in dataclasses.fields(InferenceOptions)} | {"step_cache"}
    for name, (keys, seconds) in PIPELINES.items():
        if not keys.keys() <= known or (bench.quick and name != "256px t2v"):
            continue
        if bench.has_time(f"pipeline {name}", seconds):
            yield {"pipeline": name, **tried(bench, models, keys)}


def capped_rows(bench: Bench, models: Models) -> Iterator[Row]:
    """Held to less memory, by the way that the plan proposes for a card of that size."""
    steps = {} if bench.toy else {"num_steps": CAPPED_STEPS}
    for cap in sorted(bench.caps, reverse=True):
        if not bench.has_time(f"held to {cap} GB", 30):
            continue
        way = proposed(bench, models, cap)
        keys: dict[str, Any] = {**steps, "offload": _offload(way), "gpu_memory": f"{room_of(cap)}GiB"}
        models.quantize(way)
        with memory_cap(bench.device, room_of(cap)):
            yield {"held to": f"{cap} GB", "with": way.flags or "nothing added", **tried(bench, models, keys)}


def proposed(bench: Bench, models: Models, cap: int) -> Way:
    """The way that ``--dry-run`` proposes for a card of ``cap`` GB."""
    run = PreparedRun.of(models.config(), bench.device)
    card = dataclasses.replace(CARDS[1], gib=cap)
    return Estimate(run, run.plan).on(card).way


def _offload(way: Way) -> Any:
    return "blocks" if way.streams else way.offload
