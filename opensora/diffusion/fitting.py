"""How much of the device models need while blocks of them come and go, known from their sizes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.acceleration.memory import room_on
from opensora.acceleration.packing import aligned
from opensora.acceleration.streaming import choose_streamed, held_at_once, least_room
from opensora.config.commands import InferenceOptions
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.prepared import PreparedRun, text_length
from opensora.diffusion.reuse import pays, table_bytes
from opensora.diffusion.velocity import MAX_TOKENS_AT_ONCE
from opensora.models.diffusion import as_diffusion_model
from opensora.models.mmdit import loading as mmdit
from opensora.models.quantization.loading import kind_of_section
from opensora.models.text import files as text
from opensora.models.text.files import t5_needs
from opensora.utils.errors import UserError
from opensora.utils.sizes import parse_bytes, size_text

WORKING = 1.5  # times what a model says of its activations, which is rough
WAITING = 0.25  # of its activations, a branch keeps while another is in a block
SPARE = 256 << 20  # bytes of a GPU for what libraries keep there
BIAS = 64 << 10  # bytes, more than the table of relative positions of a T5
STREAMS = ("blocks", "disk")  # values of `offload` with which blocks come and go


@dataclass(frozen=True)
class Parts:
    """What a model needs on the device, in bytes.

    Attributes:
        name: section of the config.
        blocks: weights of each block, in the order in which they run.
        rest: all other weights.
        working: activations and the like.
    """

    name: str
    blocks: tuple[int, ...]
    rest: int
    working: int

    @property
    def least(self) -> int:
        """With as few blocks there as can be."""
        return self.rest + self.working + least_room(self.blocks)

    @property
    def most(self) -> int:
        """With all blocks there."""
        return self.rest + self.working + sum(self.blocks)

    def streamed(self, room: int | None) -> list[int]:
        """Numbers of the blocks that come and go with so much memory (None: enough)."""
        found = [] if room is None else choose_streamed(self.blocks, room - self.rest - self.working)
        return [*range(len(self.blocks))] if found is None else found

    def weights(self, room: int | None) -> int:
        """Weights on the device with so much memory, as far as it allows."""
        return self.rest + held_at_once(self.blocks, self.streamed(room))


def streams(cfg: InferenceOptions) -> bool:
    """Whether blocks come and go."""
    return cfg.offload in STREAMS


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Blocks of a model that can come and go; none of those that say nothing of any."""
    in_order: Any = getattr(model, "blocks_in_order", None)
    return in_order() if in_order is not None else []


def device_room(cfg: InferenceOptions, device: torch.device) -> int | None:
    """Bytes that models may take of the device; on a CPU ``gpu_memory``, and None without: as many as they need."""
    limit = parse_bytes(cfg.gpu_memory, "gpu_memory")
    return limit if device.type == "cpu" else max(room_on(device, limit) - SPARE, 0)


def text_bytes(embedder: nn.Module, texts: int) -> float:
    """What a text encoder needs besides weights while it embeds so many texts."""
    needed: Any = getattr(embedder, "activation_bytes", None)
    return WORKING * needed(texts) if needed is not None else 0.0


def branches_of(plan: SamplePlan) -> int:
    """Guidance branches of a step, at most."""
    return 1 if plan.method == "distill" else 3 if plan.has_image else 2


def rows_at_once(plan: SamplePlan, batch: int) -> int:
    """Samples and branches that go through the diffusion model as one batch."""
    branches = branches_of(plan)
    return batch * (branches if batch * branches * plan.tokens <= MAX_TOKENS_AT_ONCE else 1)


def sampling_bytes(model: nn.Module, plan: SamplePlan, batch: int, text_tokens: int, dtype: torch.dtype) -> int:
    """What a diffusion model (on the meta device will do) needs besides weights while it samples a batch."""
    rows = rows_at_once(plan, batch)
    waiting = 1 + WAITING * (branches_of(plan) * batch / rows - 1)
    activations = as_diffusion_model(model).activation_bytes(plan.tokens + text_tokens, rows, dtype)
    return int(WORKING * waiting * activations)


def parts_of_run(run: PreparedRun, plans: Sequence[SamplePlan]) -> list[Parts]:
    """Of all models whose blocks can come and go; the text encoder only where its sizes are at hand."""
    text_tokens = text_length(run.sections["t5"])
    wanted = {"model": list(plans), **({"img_flux": [run.picture]} if run.picture is not None else {})}
    found = [
        max((_parts(run, name, plan, text_tokens) for plan in own), key=lambda parts: parts.least)
        for name, own in wanted.items()
    ]
    folder = run.sections["t5"].from_pretrained
    needs = t5_needs(Path(folder).expanduser(), text_tokens) if folder else None
    if needs is not None:
        sizes = tensor_sizes(run, "t5", needs[0])
        names = sorted({key.split(".")[2] for key in sizes if key.startswith("encoder.block.")}, key=int)
        working = WORKING * needs[1] * 2 * run.cfg.batch_size * run.dtype.itemsize
        found.append(_grouped("t5", sizes, [f"encoder.block.{name}." for name in names], int(working) + BIAS))
    return found


def tensor_sizes(run: PreparedRun, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes of a model's tensors, quantised where they are or shall be, from their shapes before that."""
    kind = kind_of_section(run.sections[name])
    quantization = (mmdit if name in run.models else text).quantization(kind, name)
    kept, parts = quantization.layout(shapes) if kind is not None else (shapes, {})
    sizes = {key: math.prod(shape) * run.dtype.itemsize for key, shape in kept.items()}
    return sizes | {key: part.nbytes for key, part in parts.items()}


def _parts(run: PreparedRun, name: str, plan: SamplePlan, text_tokens: int) -> Parts:
    """Of a diffusion model."""
    cfg, dtype, model = run.cfg, run.dtype, as_diffusion_model(run.models[name])
    working = sampling_bytes(model, plan, cfg.batch_size, text_tokens, dtype)
    rows = cfg.batch_size * plan.forwards
    sizes = tensor_sizes(run, name, {key: tuple(held.shape) for key, held in model.state_dict().items()})
    if cfg.precompute and pays(model, rows):
        away = tuple(f"{layer}." for layer in model.modulation_layers())
        sizes = {key: size for key, size in sizes.items() if not key.startswith(away)} if away else sizes
        working += table_bytes(model, rows, dtype.itemsize)
    names = {id(module): f"{key}." for key, module in model.named_modules()}
    return _grouped(name, sizes, [names[id(block)] for block in model.blocks_in_order()], working)


def _grouped(name: str, sizes: Mapping[str, int], blocks: Sequence[str], working: int) -> Parts:
    """Parts from the bytes of tensors, and what the names of those of each block start with."""
    inside = [sum(aligned(size) for key, size in sizes.items() if key.startswith(block)) for block in blocks]
    rest = sum(size for key, size in sizes.items() if not key.startswith(tuple(blocks)))
    return Parts(name, tuple(inside), rest, working)


def check_fit(run: PreparedRun, plans: Sequence[SamplePlan]) -> None:
    """See that there is room for some of the blocks at a time, where they come and go.

    Raises:
        UserError: there is not; says the least that works.
    """
    room = device_room(run.cfg, run.device) if streams(run.cfg) else None
    if room is None or run.cfg.plugin == "hybrid":  # where devices share the weights
        return
    short = [parts for parts in parts_of_run(run, plans) if parts.least > room]
    if not short:
        return
    most = max(short, key=lambda parts: parts.least)
    told = f"gpu_memory {run.cfg.gpu_memory}" if run.cfg.gpu_memory else f"{run.device} has {size_text(room)} left"
    least = most.least + (SPARE if run.device.type == "cuda" else 0)
    raise UserError(
        f"{told}: {most.name} needs {size_text(most.least)} of it at least, for two blocks of weights at a time, what "
        f"stays and its activations; --gpu-memory {as_flag(least)} is the least that works; fewer frames, a smaller "
        "resolution or batch_size need less"
    )


def as_flag(count: int) -> str:
    """Bytes as a value of ``--gpu-memory``, rounded up."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{-(-count * 100 // unit) / 100:.2f}{name}"
