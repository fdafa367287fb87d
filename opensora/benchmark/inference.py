"""Seconds per stage and step, peak memory, forwards and TFLOP/s of one video."""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora.benchmark.measuring import MIB, markdown, peak_of
from opensora.benchmark.text_encoders import random_text_encoder
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import SampleResult, VideoPipeline
from opensora.diffusion.prepared import PreparedRun, text_length
from opensora.models.build import build_ready
from opensora.models.dc_ae.config import DCAEConfig
from opensora.models.mmdit.flops import forward_flops

TERA = 1e12


def build_pipeline(cfg: InferenceOptions, device: torch.device, random_weights: bool) -> VideoPipeline:
    """The pipeline of a config, with its weights or with random ones of the same sizes."""
    if not random_weights:
        return VideoPipeline.from_config(cfg, device)
    run = PreparedRun.of(cfg, device)
    dtype, config = run.dtype, run.model.config
    home = torch.device("cpu") if cfg.offload else device
    models: dict[str, nn.Module] = {}
    widths = {"t5": config.context_in_dim, "clip": config.vec_in_dim}
    torch.manual_seed(cfg.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that no model is ever held in a wider dtype than its own
    try:
        for name, section in run.sections.items():
            if name in widths:
                models[name] = random_text_encoder(name, widths[name], text_length(section), device, dtype).to(home)
            else:
                changed = dataclasses.replace(section, from_pretrained=None)
                if isinstance(changed, DCAEConfig):
                    changed = dataclasses.replace(changed, from_scratch=True)
                models[name] = build_ready(changed, device, dtype, name).to(home)
    finally:
        torch.set_default_dtype(before)
    return VideoPipeline(models, cfg, device, dtype)


class Meter:
    """Seconds of every step and rows of every forward of a pipeline's video model."""

    def __init__(self, pipe: VideoPipeline) -> None:
        self.device = pipe.device
        self.rows = 0
        self.marks: list[tuple[int, int, int, float]] = []  # step, of how many, rows so far, time
        pipe.models["model"].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not self.marks:
            self._mark(0, 0)
        self.rows += len(kwargs["img"])

    def _mark(self, step: int, total: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append((step, total, self.rows, time.perf_counter()))

    def on_step(self, step: int, total: int, latents: Tensor) -> None:
        """Callback of the pipeline; steps of a picture made first are not looked at."""
        if self.rows:
            self._mark(step, total)

    def steps(self) -> list[tuple[float, int]]:
        """(seconds, forwards) of every step of the video."""
        pairs = zip(self.marks, self.marks[1:])
        return [(now[3] - last[3], now[2] - last[2]) for last, now in pairs]


def measure(pipe: VideoPipeline, prompt: str, full_steps: int) -> dict[str, Any]:
    """One video, after nothing else has run: what a user waits for.

    Args:
        pipe: the models.
        prompt: of the video.
        full_steps: what the denoising time is extrapolated to, from the seconds per forward.
    """
    meter, cfg = Meter(pipe), pipe.cfg
    picture = np.full((256, 256, 3), 128, np.uint8)
    reference: dict[str, Any] = {"ref": picture} if cfg.cond_type.startswith("i2v") else {"cond_type": "t2v"}
    if cfg.use_t2i2v:
        reference = {}
    device = pipe.device
    in_use = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with peak_of(device) as peak:
        result: SampleResult = pipe(prompt, seed=cfg.seed, on_step=meter.on_step, **reference)
    plan, steps = result.plan, meter.steps()
    per_forward = statistics.median(seconds / rows for seconds, rows in steps)
    flops = forward_flops(pipe.models["model"], plan.tokens, text_length(cfg.t5))
    full = dataclasses.replace(plan, times=tuple(torch.linspace(1, 0, full_steps + 1).tolist())).forwards
    stages = {f"{stage}_s": seconds for stage, seconds in result.timings.items()}
    return {
        "config": cfg.config_path,
        "condition": plan.cond_type,
        "frames": f"{plan.num_frames} x {plan.height} x {plan.width}",
        "tokens": plan.tokens,
        "offload": cfg.offload,
        **stages,
        "total_s": sum(stages.values()),
        "steps": plan.num_steps,
        "forwards": meter.rows,
        "step_s": [seconds for seconds, _ in steps],
        "median_step_s": statistics.median(seconds for seconds, _ in steps),
        "forward_s": per_forward,
        "forward_tflop": flops / TERA,
        "tflop_per_s": flops / per_forward / TERA,
        f"denoise_s_at_{full_steps}_steps": per_forward * full,
        "weights_mib": in_use / MIB if in_use else model_bytes(pipe) / MIB,
        "peak_beyond_weights_mib": peak[0] / MIB,
    }


def model_bytes(pipe: VideoPipeline) -> int:
    """Bytes of all weights."""
    return sum(p.numel() * p.element_size() for model in pipe.models.values() for p in model.parameters())


def column(row: Mapping[str, Any]) -> str:
    """The row as a table of two columns; lists of single values are left out."""
    pairs = [{"figure": key, "value": value} for key, value in row.items() if not isinstance(value, list)]
    return markdown(pairs)


def environment(device: torch.device, random_weights: bool) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "random_weights": random_weights,
    }
