"""The plan of a run in numbers, for ``--dry-run``: sizes, forwards, parameters, memory, FLOPs, files."""

from collections.abc import Sequence

from opensora.diffusion.prepared import PreparedRun, text_length
from opensora.generation.jobs import Job
from opensora.generation.room import Needs, parameter_counts
from opensora.models.diffusion import as_diffusion_model
from opensora.models.quantization.loading import kind_of_section
from opensora.utils.sizes import size_text


def dry_run_report(run: PreparedRun, jobs: Sequence[Job]) -> str:
    """What a run would do, as text for the user. No weights are loaded."""
    cfg = run.cfg
    plans = run.plans(job.request.cond_type for job in jobs)
    plans.sort(key=lambda plan: plan.forwards, reverse=True)  # the most costly first
    plan = plans[0]
    model = run.model
    counts, uncounted = parameter_counts(run)
    needs = Needs.of(run, plans, len(jobs))
    unset = [name for name in run.models if not run.sections[name].from_pretrained and counts[name]]
    text_tokens = text_length(run.sections["t5"])
    flops = model.forward_flops(plan.tokens, text_tokens) * plan.forwards
    at_most = "at most " if plan.step_cache is not None else ""
    ending = ".png" if plan.num_frames == 1 else ".mp4"
    without = f" ({' and '.join(uncounted)} not counted)" if uncounted else ""
    lines = [
        f"video        {plan.num_frames} frames of {plan.height} x {plan.width} (height x width), "
        + " or ".join(each.cond_type for each in plans),
        f"latent       {' x '.join(map(str, plan.latent_size))} (frames x rows x columns)",
        f"tokens       {plan.tokens} image + {text_tokens} text",
        f"steps        {plan.num_steps} by {plan.solver}, {at_most}{' or '.join(str(each.forwards) for each in plans)} "
        f"forwards per sample, batches of {cfg.batch_size}",
        *([f"step cache   {plan.step_cache}: approximate"] if plan.step_cache is not None else []),
        f"device       {run.device}, {cfg.dtype}, offload {'on' if cfg.offload else 'off'}",
        *(f"parameters   {count / 1e6:,.1f}M {name}" + _quantized(run, name) for name, count in counts.items()),
        f"memory       about {size_text(needs.weights)} of weights on the device{without}, and "
        f"{size_text(needs.activations)} of activations while sampling",
        f"compute      {at_most or 'about '}{flops / 1e12:,.3g} TFLOP per sample",
        *_picture_lines(run, text_tokens),
        *(f"weights      {name}: random, no from_pretrained" for name in unset),
        f"files        {len(jobs)} to write, with .txt and .json beside:",
        *(f"  {job.stem}{ending}" for job in jobs),
        "dry run: nothing loaded, nothing written",
    ]
    return "\n".join(lines)


def _quantized(run: PreparedRun, name: str) -> str:
    kind = kind_of_section(run.sections[name])
    return "" if kind is None else f", quantised to {kind}: approximate"


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
