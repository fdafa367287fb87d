"""A training run in numbers, for ``--dry-run``: memory by part, arithmetic, and seconds on cards that people have."""

import dataclasses
import math
from collections.abc import Sequence

from opensora.acceleration.devices import torch_dtype
from opensora.acceleration.parallel_context import Sizes
from opensora.acceleration.plugins import plugin_name
from opensora.config.commands import TrainOptions
from opensora.datasets.buckets import Bucket, BucketTable
from opensora.diffusion.cards import CARDS, COPY_SHARE, MATRIX_SHARE, Card
from opensora.models.autoencoder import LatentSpec
from opensora.training.diffusion.checks import TrainingPlan, check_config
from opensora.training.diffusion.encoders import encoders_to_load
from opensora.training.diffusion.memory import (
    PARTS,
    RELEASED,
    Trained,
    activation_bytes,
    encode_cost,
    encode_work,
    encoder_bytes,
    held,
    in_host,
    recomputed_blocks,
)
from opensora.utils.sizes import gib, seconds_text

# A step with adapters over the same without, on an H100: 1.84 s in fp32 for LoRA on all linear layers
ADAPTERS_TAKE = {"fp32": 1.66, "bf16": 1.27}
UPDATE_BYTES = 28  # moved for each number that trains: gradient, two moments, master and weight, read and written
DAY = 86_400
BUCKET_HEADINGS = ["bucket", "batch", "tokens", "TFLOP/step", "peak GiB"]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on batches of one bucket.

    Attributes:
        bucket: its largest shape.
        tokens, texts: of image and text, of a sample.
        flops: of the model's forward and backward pass on a rank, all micro-batches of a step; recomputation aside.
        work: bytes of activations, or of encoding, whichever is more.
    """

    bucket: Bucket
    tokens: int
    texts: int
    flops: float
    work: float


class TrainingOutlook:
    """What a config takes.

    Args:
        cfg: resolved config, checked.
        plan: what `check_config` found.
        ranks: processes.
    """

    def __init__(self, cfg: TrainOptions, plan: TrainingPlan, ranks: int) -> None:
        self.cfg, self.plan, self.ranks = cfg, plan, ranks
        self.trained = Trained.of(cfg, plan.model)
        self.parts = held(cfg, self.trained, ranks, encoder_bytes(cfg, plan.model, plan.ae))
        self.host = in_host(cfg, self.trained, ranks)
        self.sizes = Sizes.of(plugin_name(cfg.plugin), cfg.plugin_config).fit(ranks)
        self.steps = [self._step(bucket) for bucket in self._largest_shapes()]

    def _largest_shapes(self) -> list[Bucket]:
        """One bucket of each resolution and length: that of most pixels."""
        chosen: dict[tuple[str, int], Bucket] = {}
        for bucket in BucketTable(self.cfg.bucket_config or {}, self.plan.inputs.spatial_multiple).buckets:
            key, pixels = (bucket.resolution, bucket.num_frames), bucket.height * bucket.width
            if key not in chosen or pixels > chosen[key].height * chosen[key].width:
                chosen[key] = bucket
        return [*chosen.values()]

    def _step(self, bucket: Bucket) -> Step:
        cfg, model = self.cfg, self.plan.model
        frames = self.plan.inputs.frames_at_once(bucket.num_frames)
        size = LatentSpec.of(self.plan.ae).latent_size(frames, bucket.height, bucket.width)
        tokens, texts = math.prod(size) // cfg.patch_size**2, getattr(cfg.t5, "max_length", 512)
        share = self.sizes.sp * self.sizes.tp
        samples = bucket.batch_size * cfg.accumulation_steps
        flops = model.forward_flops(tokens, texts) * (2 + self.trained.share) * samples / share
        work = activation_bytes(cfg, model, math.ceil((tokens + texts) / self.sizes.sp), bucket.batch_size)
        cost = encode_cost(cfg, self.plan.ae, bucket)
        if cost is not None:
            work = max(work, encode_work(cfg, cost, bucket.batch_size, share))
        return Step(bucket, tokens, texts, flops, work)

    @property
    def held(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def peak(self, step: Step) -> float:
        """Most bytes on a device."""
        return self.held + step.work

    @property
    def most(self) -> Step:
        """The step that needs most memory."""
        return max(self.steps, key=self.peak)

    @property
    def longest(self) -> Step:
        """The step of most arithmetic."""
        return max(self.steps, key=lambda step: step.flops)

    def seconds(self, step: Step, card: Card) -> float:
        """Of a step on a card: arithmetic, encoding and update, without what ranks exchange."""
        cfg, model, rows = self.cfg, self.plan.model, step.bucket.batch_size * self.cfg.accumulation_steps
        once, twice = (model.forward_flops(n * step.tokens, n * step.texts) for n in (1, 2))
        attention = max((twice - 2 * once) / 2, 0.0)
        again, every = recomputed_blocks(cfg, model)
        moved = model.activation_bytes(step.tokens + step.texts, 1, torch_dtype(cfg.dtype)) * every
        passes = 2 + self.trained.share + again / max(every, 1)
        found = passes * card.forward_seconds(once - attention, attention, moved) / self.sizes.sp / self.sizes.tp
        found *= ADAPTERS_TAKE[cfg.lora_dtype] if cfg.lora_config else 1.0
        cost = encode_cost(cfg, self.plan.ae, step.bucket)
        if cost is not None:
            batch = step.bucket.batch_size  # divided over the ranks that work on it
            own = math.ceil(batch / (self.sizes.sp * self.sizes.tp)) / batch
            found += own * card.network_seconds(cost.flops, cost.written)
        if "t5" in encoders_to_load(cfg) and model.config.context_in_dim == RELEASED["t5"][0]:
            found += 2.0 * RELEASED["t5"][1] * step.texts / MATRIX_SHARE / card.tflops / 1e12
        if cfg.weights_memory:  # blocks come twice in a step, beside the computation
            found = max(found, 2 * card.copy_seconds(max(self.trained.frozen - self.parts["weights"], 0.0)) / rows)
        divided = self.trained.count * self._states / max(self._whole_states, 1.0)
        update = UPDATE_BYTES * divided / COPY_SHARE / card.bandwidth / 1e9
        away = sum(size for part, size in self.host.items() if part != "ema")
        return rows * found + update + 2 * card.copy_seconds(away)  # there and back

    @property
    def _states(self) -> float:
        return self.parts["states"] + self.host.get("states", 0.0)

    @property
    def _whole_states(self) -> float:
        return held(self.cfg, self.trained, 1)["states"] + in_host(self.cfg, self.trained, 1).get("states", 0.0)


def outlook_of(cfg: TrainOptions, world_size: int = 1) -> TrainingOutlook:
    """Check a config and work out what it takes; nothing is loaded.

    Raises:
        UserError: see `check_config`.
    """
    ranks = cfg.dry_run_ranks or world_size
    return TrainingOutlook(cfg, check_config(cfg, ranks), ranks)


def report(outlook: TrainingOutlook) -> str:
    """What ``--dry-run`` prints."""
    cfg, most, longest = outlook.cfg, outlook.most, outlook.longest
    groups = max(outlook.ranks // outlook.sizes.sp // outlook.sizes.tp, 1)
    trained, count = outlook.trained.count, outlook.trained.count + outlook.trained.frozen_numbers
    lines = [
        f"processes    {outlook.ranks}, plugin {cfg.plugin}, {cfg.dtype}; {groups} groups with samples of their own",
        f"parameters   {count / 1e6:,.1f}M, {trained / 1e6:,.1f}M of them trained with {cfg.optim.cls}",
        "memory       of each device, GiB: " + ", ".join(f"{part} {gib(outlook.parts[part])}" for part in PARTS),
        *_host_line(outlook),
        f"             activations, or encoding: {gib(most.work)}; peak {gib(outlook.peak(most))} "
        f"(batches of {_shape(most.bucket)})",
        "",
        *_columns([BUCKET_HEADINGS, *(_row(outlook, step) for step in _longest_of_batch(outlook.steps))]),
        "",
        f"estimated    for the longest step ({_shape(longest.bucket)}), what devices exchange not counted",
        *_columns([["card", "fits", "step", _run_heading(cfg)], *(_card_row(outlook, card) for card in CARDS)]),
        "dry run: nothing loaded, nothing written",
    ]
    return "\n".join(lines)


def _host_line(outlook: TrainingOutlook) -> list[str]:
    if not outlook.host:
        return []
    parts = ", ".join(f"{part} {gib(size)}" for part, size in outlook.host.items() if size)
    return [f"             of the host, for each device: {parts}"]


def _longest_of_batch(steps: Sequence[Step]) -> list[Step]:
    """Of each resolution and batch size, the most frames."""
    chosen: dict[tuple[str, int], Step] = {}
    for step in sorted(steps, key=lambda step: step.bucket.num_frames):
        chosen[step.bucket.resolution, step.bucket.batch_size] = step
    return [*chosen.values()]


def _shape(bucket: Bucket) -> str:
    return f"{bucket.batch_size} x {bucket.num_frames} frames of {bucket.height} x {bucket.width}"


def _row(outlook: TrainingOutlook, step: Step) -> list[str]:
    bucket = step.bucket
    return [
        f"{bucket.resolution} {bucket.num_frames}", str(bucket.batch_size), f"{step.tokens}+{step.texts}",
        f"{step.flops / 1e12:,.3g}", gib(outlook.peak(step)),
    ]  # fmt: skip


def _run_heading(cfg: TrainOptions) -> str:
    return f"{cfg.max_steps} steps" if cfg.max_steps else "1000 steps"


def _card_row(outlook: TrainingOutlook, card: Card) -> list[str]:
    fits = outlook.peak(outlook.most) <= card.room
    seconds = outlook.seconds(outlook.longest, card)
    days = (outlook.cfg.max_steps or 1000) * seconds / DAY
    return [card.name, "yes" if fits else "no", seconds_text(seconds), f"at most {days:.2g} days"]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows]
