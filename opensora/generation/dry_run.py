"""The plan of a run in numbers, for ``--dry-run``: sizes, forwards, parameters, memory, FLOPs, files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.acceleration.devices import torch_dtype
from opensora.diffusion.plan import LatentSpec, SamplePlan, image_plan, make_plan
from opensora.diffusion.velocity import MAX_TOKENS_AT_ONCE
from opensora.generation.jobs import Job
from opensora.models.build import build_on_meta, count_parameters
from opensora.models.mmdit.flops import activation_bytes, forward_flops
from opensora.utils.weights import read_header


def dry_run_report(cfg: Mapping[str, Any], device: torch.device, jobs: Sequence[Job]) -> str:
    """What a run would do, as text for the user. No weights are loaded."""
    plans = _plans(cfg, jobs)
    plan = plans[0]
    dtype = torch_dtype(cfg["dtype"])
    model: Any = build_on_meta(cfg["model"])
    names = ["model", "ae"] + (["img_flux", "img_flux_ae"] if cfg["use_t2i2v"] else [])
    counts = {name: count_parameters(build_on_meta(cfg[name])) for name in names}
    uncounted = []
    for name in ("t5", "clip"):
        found = encoder_parameters(cfg[name].get("from_pretrained"))
        if found is None:
            uncounted.append(name)
        else:
            counts[name] = found
    text_tokens = cfg["t5"]["max_length"]
    flops = forward_flops(model, plan.tokens, text_tokens) * plan.forwards
    tokens = plan.tokens + text_tokens
    batch = cfg["batch_size"]
    branches = 1 if plan.method == "distill" else 3 if plan.has_image else 2
    rows = batch * (branches if batch * branches * plan.tokens <= MAX_TOKENS_AT_ONCE else 1)
    weights = (max if cfg["offload"] else sum)(count * dtype.itemsize for count in counts.values())
    ending = ".png" if plan.num_frames == 1 else ".mp4"
    without = f" ({' and '.join(uncounted)} not counted)" if uncounted else ""
    lines = [
        f"video        {plan.num_frames} frames of {plan.height} x {plan.width} (height x width), "
        + " or ".join(each.cond_type for each in plans),
        f"latent       {' x '.join(map(str, plan.latent_size))} (frames x rows x columns)",
        f"tokens       {plan.tokens} image + {text_tokens} text",
        f"steps        {plan.num_steps} by {plan.solver}, {' or '.join(str(each.forwards) for each in plans)} forwards "
        f"per sample, batches of {batch}",
        f"device       {device}, {cfg['dtype']}, offload {'on' if cfg['offload'] else 'off'}",
        *(f"parameters   {count / 1e6:,.1f}M {name}" for name, count in counts.items()),
        f"memory       about {_size(weights)} of weights on the device{without}, and "
        f"{_size(activation_bytes(model, tokens, rows, dtype))} of activations while sampling",
        f"compute      about {flops / 1e12:,.3g} TFLOP per sample",
        *_picture_lines(cfg, text_tokens),
        *(f"weights      {name}: random, no from_pretrained" for name in names if not cfg[name].get("from_pretrained")),
        f"files        {len(jobs)} to write, with .txt and .json beside:",
        *(f"  {job.stem}{ending}" for job in jobs),
        "dry run: nothing loaded, nothing written",
    ]
    return "\n".join(lines)


def _plans(cfg: Mapping[str, Any], jobs: Sequence[Job]) -> list[SamplePlan]:
    """The plan of every condition that the samples have, the most costly first."""
    spec = LatentSpec.of(build_on_meta(cfg["ae"]))
    conditions = sorted({job.request.cond_type for job in jobs})
    plans = [make_plan(cfg["sampling_option"], spec, cfg["patch_size"], each) for each in conditions]
    return sorted(plans, key=lambda plan: plan.forwards, reverse=True)


def encoder_parameters(path: str | None) -> int | None:
    """Parameters of a text encoder, from the headers of its safetensors files; None where there are none."""
    folder = Path(path or "").expanduser()
    headers = [read_header(file) for file in folder.glob("*.safetensors")] if path else []
    shapes = [
        tensor["shape"]
        for header in headers
        for key, tensor in header.items()
        # of whole models, only the half that reads text is loaded
        if key != "__metadata__" and not key.startswith(("vision_model.", "visual_projection.", "decoder."))
    ]
    return sum(map(math.prod, shapes)) if shapes else None


def _picture_lines(cfg: Mapping[str, Any], text_tokens: int) -> list[str]:
    """What the picture that comes first costs (``use_t2i2v``)."""
    if not cfg["use_t2i2v"]:
        return []
    plan = image_plan(cfg, cfg["sampling_option"], LatentSpec.of(build_on_meta(cfg["img_flux_ae"])))
    flops = forward_flops(build_on_meta(cfg["img_flux"]), plan.tokens, text_tokens) * plan.forwards
    return [
        f"picture      {plan.height} x {plan.width} first, {plan.tokens} tokens, {plan.forwards} forwards, about "
        f"{flops / 1e12:,.3g} TFLOP"
    ]


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
