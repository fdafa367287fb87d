"""The plan of a run in numbers, for ``--dry-run``: sizes, forwards, parameters, memory, FLOPs, files."""

import dataclasses
import sys
from collections.abc import Sequence

import torch

from opensora.acceleration.memory import memory_of
from opensora.diffusion.cards import CARDS, CONTEXT, Card, known_card
from opensora.diffusion.fitting import device_room, parts_of_run, streams
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.prepared import PreparedRun, text_length
from opensora.diffusion.references import given_frames
from opensora.generation.estimate import Estimate, Outlook, Way, gib, seconds_text
from opensora.generation.jobs import Job
from opensora.generation.room import Needs, parameter_counts
from opensora.models.diffusion import as_diffusion_model
from opensora.models.quantization.loading import kind_of_section
from opensora.utils.sizes import parse_bytes, size_text

GIVEN_LINES = 8


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
    ending = ".png" if plan.length == 1 else ".mp4"
    without = f" ({' and '.join(uncounted)} not counted)" if uncounted else ""
    lines = [
        f"video        {plan.length} frames of {plan.height} x {plan.width} (height x width), "
        + " or ".join(each.cond_type for each in plans),
        *_window_lines(plan),
        *_given_lines(plans, jobs),
        f"latent       {' x '.join(map(str, plan.latent_size))} (frames x rows x columns)",
        f"tokens       {plan.tokens} image + {text_tokens} text",
        f"steps        {plan.num_steps} by {plan.solver}, {at_most}{' or '.join(str(each.forwards) for each in plans)} "
        f"forwards per sample, batches of {cfg.batch_size}",
        *([f"step cache   {plan.step_cache}: approximate"] if plan.step_cache is not None else []),
        f"device       {run.device}, {cfg.dtype}, offload {_offload_text(cfg.offload)}",
        *_stream_lines(run, plans),
        *(f"parameters   {count / 1e6:,.1f}M {name}" + _quantized(run, name) for name, count in counts.items()),
        f"memory       about {size_text(needs.weights)} of weights on the device{without}, and "
        f"{size_text(needs.activations)} of activations while sampling",
        f"compute      {at_most or 'about '}{flops / 1e12:,.3g} TFLOP per sample",
        *_picture_lines(run, text_tokens),
        *(f"weights      {name}: random, no from_pretrained" for name in unset),
        f"files        {len(jobs)} to write, with .txt and .json beside:",
        *(f"  {job.stem}{ending}" for job in jobs),
        "dry run: nothing loaded, nothing written",
        *_outlook_lines(Estimate(run, plan)),
    ]
    return "\n".join(lines)


def _outlook_lines(estimate: Estimate) -> list[str]:
    """What the run takes by stage, and on cards that people have."""
    run, own = estimate.run, estimate.own
    here = _card_here(run)
    peaks, _ = estimate.peaks(own, here.room if here is not None else sys.maxsize)
    read = sum(estimate.weights(Way()).values())
    return [
        "",
        "peak         of the GPU, GiB: " + ", ".join(f"{stage} {gib(count)}" for stage, count in peaks.items()),
        f"host memory  about {size_text(estimate.host(own))}; {size_text(read)} of weights to read",
        *([_fit_line(estimate, here)] if here is not None else []),
        "",
        "estimated    for one sample; what is added to the command line where the run would not fit as it is",
        *table([_row(estimate.on(card), card) for card in CARDS]),
    ]


def _row(outlook: Outlook, card: Card) -> list[str]:
    stages = [seconds_text(outlook.seconds[stage]) for stage in ("text", "denoise", "decode")]
    if not outlook.fits:
        return [card.name, f"{gib(outlook.peak)} GiB", "", "", "", "", "does not fit"]
    return [card.name, f"{gib(outlook.peak)} GiB", *stages, seconds_text(outlook.total), outlook.way.flags]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows below their headings, in columns."""
    rows = [["card", "peak", "text", "denoise", "decode", "sample", "with"], *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows]


def _fit_line(estimate: Estimate, here: Card) -> str:
    """Whether the run fits the GPU that is there."""
    own, best = estimate.outlook(estimate.own, here), estimate.on(here)
    room = f"{here.name}, of which {gib(here.room)} GiB may be used"
    tiles = f", decoding in {own.tiles}" if own.tiles else ""
    if own.fits:
        return f"fits         {room}{tiles}"
    if best.fits:
        return f"fits not     {room}: {gib(own.peak)} GiB; add {best.way.flags}"
    return f"fits not     {room}: {gib(own.peak)} GiB; fewer frames or a smaller resolution need less"


def _card_here(run: PreparedRun) -> Card | None:
    """The GPU that a run would work on, with what `gpu_memory` allows of it; None on a CPU."""
    if run.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(run.device)
    known = known_card(name) or CARDS[0]
    limit = parse_bytes(run.cfg.gpu_memory, "gpu_memory")
    allowed = memory_of(run.device)[0] if limit is None else limit + CONTEXT
    return dataclasses.replace(known, name=name, gib=allowed / 2**30)


def _quantized(run: PreparedRun, name: str) -> str:
    kind = kind_of_section(run.sections[name])
    return "" if kind is None else f", quantised to {kind}: approximate"


def _offload_text(offload: bool | str) -> str:
    return offload if isinstance(offload, str) else "on" if offload else "off"


def _stream_lines(run: PreparedRun, plans: Sequence[SamplePlan]) -> list[str]:
    """Which blocks come and go (``offload`` blocks or disk)."""
    if not streams(run.cfg):
        return []
    room, lines = device_room(run.cfg, run.device), []
    for parts in parts_of_run(run, plans):
        moving = parts.streamed(room)
        copied = size_text(sum(parts.blocks[i] for i in moving))
        lines.append(
            f"blocks       {parts.name}: {len(moving)} of {len(parts.blocks)} come and go, {copied} for each "
            f"{'text batch' if parts.name == 't5' else 'evaluation'}; the least is {size_text(parts.least)} of memory, "
            f"{size_text(parts.most)} keep all there"
        )
    return lines


def _window_lines(plan: SamplePlan) -> list[str]:
    """How a video is divided that is longer than what the model makes at once."""
    windows, after = plan.windows, plan.after
    if windows is None or after is None:
        return []
    shared = "the last latent frame" if windows.overlap == 1 else f"the last {windows.overlap} latent frames"
    first = plan.forwards - (windows.count - 1) * after.forwards
    return [
        f"windows      {windows.count} of {plan.num_frames} frames: {first} forwards for the first, {after.forwards} "
        f"for each further one, which continues from {shared}"
    ]


def _given_lines(plans: Sequence[SamplePlan], jobs: Sequence[Job]) -> list[str]:
    """Which frames references give, where each prompt says it."""
    by_type = {plan.cond_type: plan for plan in plans}
    lines: dict[str, None] = {}  # each once, in order
    for job in jobs:
        given = given_frames(job.request.refs, by_type[job.request.cond_type])
        texts = [f"{name} is frame {a}" if a == b else f"{name} is frames {a} to {b}" for name, a, b in given]
        if texts:
            lines["given        " + ", ".join(texts)] = None
    return [*lines][:GIVEN_LINES]


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
