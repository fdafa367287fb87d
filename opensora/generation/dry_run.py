"""The plan of a run in numbers, for ``--dry-run``: sizes, forwards, parameters, memory, FLOPs, files."""

import math
from collections.abc import Sequence
from pathlib import Path

from opensora.diffusion.prepared import TEXT_ENCODERS, PreparedRun, text_length
from opensora.diffusion.velocity import MAX_TOKENS_AT_ONCE
from opensora.generation.jobs import Job
from opensora.models.build import count_parameters
from opensora.models.diffusion import as_diffusion_model
from opensora.utils.weights import read_header


def dry_run_report(run: PreparedRun, jobs: Sequence[Job]) -> str:
    """What a run would do, as text for the user. No weights are loaded."""
    cfg = run.cfg
    plans = run.plans(job.request.cond_type for job in jobs)
    plans.sort(key=lambda plan: plan.forwards, reverse=True)  # the most costly first
    plan = plans[0]
    model = run.model
    counts = {name: count_parameters(model) for name, model in run.models.items()}
    unset = [name for name in run.models if not run.sections[name].from_pretrained and counts[name]]
    uncounted = []
    for name in TEXT_ENCODERS:
        found = encoder_parameters(run.sections[name].from_pretrained)
        if found is None:
            uncounted.append(name)
        else:
            counts[name] = found
    text_tokens = text_length(run.sections["t5"])
    flops = model.forward_flops(plan.tokens, text_tokens) * plan.forwards
    tokens = plan.tokens + text_tokens
    batch = cfg.batch_size
    branches = 1 if plan.method == "distill" else 3 if plan.has_image else 2
    rows = batch * (branches if batch * branches * plan.tokens <= MAX_TOKENS_AT_ONCE else 1)
    weights = (max if cfg.offload else sum)(count * run.dtype.itemsize for count in counts.values())
    ending = ".png" if plan.num_frames == 1 else ".mp4"
    without = f" ({' and '.join(uncounted)} not counted)" if uncounted else ""
    lines = [
        f"video        {plan.num_frames} frames of {plan.height} x {plan.width} (height x width), "
        + " or ".join(each.cond_type for each in plans),
        f"latent       {' x '.join(map(str, plan.latent_size))} (frames x rows x columns)",
        f"tokens       {plan.tokens} image + {text_tokens} text",
        f"steps        {plan.num_steps} by {plan.solver}, {' or '.join(str(each.forwards) for each in plans)} forwards "
        f"per sample, batches of {batch}",
        f"device       {run.device}, {cfg.dtype}, offload {'on' if cfg.offload else 'off'}",
        *(f"parameters   {count / 1e6:,.1f}M {name}" for name, count in counts.items()),
        f"memory       about {_size(weights)} of weights on the device{without}, and "
        f"{_size(model.activation_bytes(tokens, rows, run.dtype))} of activations while sampling",
        f"compute      about {flops / 1e12:,.3g} TFLOP per sample",
        *_picture_lines(run, text_tokens),
        *(f"weights      {name}: random, no from_pretrained" for name in unset),
        f"files        {len(jobs)} to write, with .txt and .json beside:",
        *(f"  {job.stem}{ending}" for job in jobs),
        "dry run: nothing loaded, nothing written",
    ]
    return "\n".join(lines)


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


def _picture_lines(run: PreparedRun, text_tokens: int) -> list[str]:
    """What the picture that comes first costs (``use_t2i2v``)."""
    plan = run.picture
    if plan is None:
        return []
    flops = as_diffusion_model(run.models["img_flux"]).forward_flops(plan.tokens, text_tokens) * plan.forwards
    return [
        f"picture      {plan.height} x {plan.width} first, {plan.tokens} tokens, {plan.forwards} forwards, about "
        f"{flops / 1e12:,.3g} TFLOP"
    ]


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
