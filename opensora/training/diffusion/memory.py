"""Bytes that a training run holds on each device, by part, from sizes alone.

Weights, fp32 copies, gradients, optimizer states and averages are counted exactly; gathered blocks, activations and
what encoders work with are estimates. A block at work in forward and backward was measured on an H100 (4 + 8 blocks of
the 11B model at 8,828 tokens, and LoRA on all of it).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from opensora.acceleration.devices import torch_dtype
from opensora.acceleration.plugins import COLOSSAL, plugin_name
from opensora.config.commands import TrainOptions
from opensora.datasets.buckets import Bucket
from opensora.models.autoencoder import Autoencoder
from opensora.models.diffusion import DiffusionModel
from opensora.models.mmdit.loading import quantization
from opensora.models.mmdit.model import MMDiTModel
from opensora.models.quantization.loading import kind_of_section
from opensora.models.vae.fitting import MARGIN
from opensora.models.vae.footprint import Cost
from opensora.training.diffusion.encoders import encoders_to_load
from opensora.training.diffusion.sharing import ENCODE_MEMORY
from opensora.training.weights.adapters import LoraAdapter, freeze
from opensora.training.weights.eight_bits import BLOCK_IN_8_BITS, is_kept_in_8_bits
from opensora.training.weights.optimizer import IN_8_BITS, is_hidden_matrix
from opensora.utils.sizes import parse_bytes

PARTS = ("weights", "masters", "gradients", "states", "ema", "buffers", "encoders")
FP32 = 4  # bytes
AT_WORK, AT_WORK_FP32 = 1.5, 2.4  # activations of a block in forward and backward, over those of a forward alone
RELEASED = {"t5": (4096, 4_762_310_656), "clip": (768, 123_060_480)}  # width and parameters of encoders
QUANTIZED = {"fp8": 0.51, "int8": 0.51, "nf4": 0.29}  # of 16-bit weights


@dataclass(frozen=True)
class Trained:
    """What of a model trains, and what it holds besides.

    Attributes:
        shapes: of the parameters that train, by name.
        frozen: bytes of the other weights, quantised where they are.
        frozen_numbers: of them.
        in_blocks: numbers that train in the largest block, and bytes of its frozen weights.
        outside: the same of what is in no block.
    """

    shapes: Mapping[str, tuple[int, ...]]
    frozen: float
    frozen_numbers: int
    in_blocks: tuple[int, float]
    outside: tuple[int, float]

    @property
    def count(self) -> int:
        """Numbers that train."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def share(self) -> float:
        """Of the model that trains."""
        return self.count / max(self.count + self.frozen_numbers, 1)

    @classmethod
    def of(cls, cfg: TrainOptions, model: DiffusionModel) -> "Trained":
        """From a config and its model on the meta device, which is left as it is."""
        plain = {name: tuple(p.shape) for name, p in model.named_parameters()}
        itemsize = torch_dtype(cfg.dtype).itemsize
        kind = kind_of_section(cfg.model) if isinstance(model, MMDiTModel) else None
        kept, packed = quantization(kind).layout(plain) if kind is not None else (plain, {})
        sizes = {name: math.prod(shape) * itemsize for name, shape in kept.items()}
        sizes |= {name: part.nbytes for name, part in packed.items()}
        trained = copy.deepcopy(model)
        if cfg.lora_config:
            LoraAdapter(trained, cfg.lora_config)
        else:
            freeze(trained, cfg.freeze_layers)
        shapes = {name: tuple(p.shape) for name, p in trained.named_parameters() if p.requires_grad}
        frozen = {name: size for name, size in sizes.items() if name not in shapes}
        starts = _block_names(model)

        def within(start: tuple[str, ...], inside: bool = True) -> tuple[int, float]:
            return (
                sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(start) == inside),
                sum(size for name, size in frozen.items() if name.startswith(start) == inside),
            )

        blocks = [within((start,)) for start in starts] or [(0, 0.0)]
        largest = (max(count for count, _ in blocks), max(size for _, size in blocks))
        numbers = sum(map(math.prod, plain.values())) - sum(math.prod(plain[name]) for name in shapes if name in plain)
        return cls(shapes, float(sum(frozen.values())), numbers, largest, within(tuple(starts), inside=False))


def _block_names(model: DiffusionModel) -> list[str]:
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    return [names[id(block)] for block in model.blocks_in_order()]


def state_bytes(trained: Trained, optimizer: str, divided: bool = False) -> float:
    """Bytes of an optimizer's moments, of all parameters; ``divided`` as fsdp2 does."""

    def of(name: str, shape: tuple[int, ...]) -> float:
        count = math.prod(shape)
        if optimizer == IN_8_BITS and is_kept_in_8_bits(shape, divided):
            return 2.0 * (count + FP32 * math.ceil(count / BLOCK_IN_8_BITS))
        if optimizer == "Muon" and is_hidden_matrix(name, _Matrix(shape)):  # type: ignore[arg-type]
            return float(FP32 * count)
        return 2.0 * FP32 * count

    return sum(of(name, shape) for name, shape in trained.shapes.items())


@dataclass(frozen=True)
class _Matrix:
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def held(cfg: TrainOptions, trained: Trained, ranks: int, encoders: float = 0.0) -> dict[str, float]:
    """Bytes on each device between steps and, of gradients and buffers, at the end of a backward pass.

    Args:
        cfg: its plugin, dtypes, optimizer and average count.
        trained: what trains.
        ranks: processes of the run.
        encoders: bytes of the frozen encoders.

    Returns:
        By the names of :data:`PARTS`.
    """
    found = _everywhere(cfg, trained, ranks)
    away, largest = in_host(cfg, trained, ranks), max(map(math.prod, trained.shapes.values()), default=0)
    share = largest / max(trained.count, 1)
    if cfg.optim.in_backward:
        found["gradients"] = largest * (FP32 + (found["weights"] - trained.frozen) / max(trained.count, 1))
    for part, size in away.items():
        found[part] -= size
        found["buffers"] += 2 * share * size if part != "ema" else 0.0  # one at work, one on its way
    return {**found, "encoders": encoders}


def in_host(cfg: TrainOptions, trained: Trained, ranks: int) -> dict[str, float]:
    """Bytes that each process keeps in host memory instead (``optim.states``), by part."""
    if cfg.optim.states != "host":
        return {}
    found, name = _everywhere(cfg, trained, ranks), plugin_name(cfg.plugin) if ranks > 1 else None
    copies = name != "fsdp2" and found["masters"] > 0  # which are averaged where they are
    return {part: found[part] for part in (("states", "masters", "ema") if copies else ("states",))}


def _everywhere(cfg: TrainOptions, trained: Trained, ranks: int) -> dict[str, float]:
    """Bytes of each process, without encoders, wherever they are."""
    name = plugin_name(cfg.plugin) if ranks > 1 else None
    tp = cfg.plugin_config.tp_size if name is not None else 1
    count, frozen, itemsize = trained.count / tp, trained.frozen / tp, torch_dtype(cfg.dtype).itemsize
    if cfg.lora_config:
        itemsize = torch_dtype(cfg.lora_dtype).itemsize
    states = state_bytes(trained, cfg.optim.cls, name == "fsdp2") / tp
    averaged = count if cfg.lora_config else count + trained.frozen_numbers / tp
    ema = FP32 * averaged if cfg.ema_decay else 0.0
    if cfg.weights_memory:
        frozen = min(frozen, float(parse_bytes(cfg.weights_memory, "weights_memory")))
    replicas = max(ranks // tp, 1)
    if name == "fsdp2":
        found = _divided(cfg, trained, min(cfg.plugin_config.shard_size or replicas, replicas), itemsize, states, ema)
    elif name in COLOSSAL and name != "torch_ddp":
        found = _zero(
            cfg, name, count, frozen, max(replicas // cfg.plugin_config.sp_size, 1), itemsize, states, ema / replicas
        )
    else:
        masters = FP32 * count if itemsize < FP32 else 0.0
        exchange = 0.0
        if name is not None:  # DDP's buckets hold all gradients; averaging at the step takes some at a time, twice
            exchange = min(2.0 * FP32 * max(2**25, count / 100), 2.0 * FP32 * count) if masters else FP32 * count
        found = dict(
            weights=frozen + itemsize * count, masters=masters, gradients=FP32 * count, states=states,
            ema=ema / replicas, buffers=exchange,
        )  # fmt: skip
    return found


def _divided(
    cfg: TrainOptions, trained: Trained, shard: int, itemsize: int, states: float, ema: float
) -> dict[str, float]:
    """Under FSDP2: everything over ``shard`` ranks; two blocks and what is in none are there whole, and so are the
    gradients of a block, and of all blocks where ``whole_gradients`` accumulates them."""
    count, tp = trained.count, cfg.plugin_config.tp_size
    block, rest = (of[0] * itemsize + of[1] for of in (trained.in_blocks, trained.outside))
    whole = FP32 * count if cfg.accumulation_steps > 1 and cfg.plugin_config.whole_gradients else 0.0
    return dict(
        weights=trained.frozen / shard / tp,
        masters=FP32 * count / shard / tp,
        gradients=(FP32 * count / shard + whole) / tp,
        states=states / shard,
        ema=ema / shard,
        buffers=(2 * block + rest + trained.in_blocks[0] * (itemsize + FP32)) / tp,
    )


def _zero(
    cfg: TrainOptions, name: str, count: float, frozen: float, ranks: int, itemsize: int, states: float, ema: float
) -> dict[str, float]:
    """Under ColossalAI's ZeRO: stage 1 divides masters and states, stage 2 gradients too."""
    stage = {"zero1": 1, "zero2": 2}.get(name, cfg.plugin_config.zero_stage)
    divided = ranks if stage else 1
    return dict(
        weights=frozen + itemsize * count,
        masters=FP32 * count / divided if itemsize < FP32 else 0.0,
        gradients=itemsize * count / (ranks if stage == 2 else 1),
        states=states / divided,
        ema=ema,
        buffers=2.0 * itemsize * cfg.plugin_config.reduce_bucket_size_in_m * 2**20,
    )


def encoder_bytes(cfg: TrainOptions, model: DiffusionModel, ae: Autoencoder) -> float:
    """Bytes of the encoders that the run loads; of text encoders of other sizes than the released ones, none."""
    itemsize, total = torch_dtype(cfg.dtype).itemsize, 0.0
    widths = {"t5": model.config.context_in_dim, "clip": model.config.vec_in_dim}
    for name in encoders_to_load(cfg):
        if name == "ae":
            network: Any = ae
            total += itemsize * _parameters(network, encode_only=not cfg.samples)
        elif widths[name] == RELEASED[name][0]:
            kind = getattr(getattr(cfg, name), "quantize", None) or ""
            total += RELEASED[name][1] * itemsize * QUANTIZED.get(kind, 1.0)
    return total


def _parameters(ae: nn.Module, encode_only: bool) -> int:
    return sum(p.numel() for name, p in ae.named_parameters() if not (encode_only and name.startswith("decoder.")))


def recomputed_blocks(cfg: TrainOptions, model: DiffusionModel) -> tuple[int, int]:
    """Blocks that are computed again in the backward pass, and all blocks."""
    every = len(model.blocks_in_order())
    if not cfg.grad_checkpoint:
        return 0, every
    chosen = getattr(cfg.model, "grad_ckpt_settings", None)
    if not isinstance(model, MMDiTModel) or chosen is None:
        return every, every
    return sum(min(n, len(of)) for n, of in zip(chosen, (model.double_blocks, model.single_blocks))), every


def activation_bytes(cfg: TrainOptions, model: DiffusionModel, tokens: int, rows: int) -> float:
    """Of a forward and backward pass: inputs of recomputed blocks, all of the others, and a block at work.

    Args:
        tokens: of image and text, those of this rank.
        rows: samples.
    """
    dtype = torch_dtype(cfg.dtype)
    again, every = recomputed_blocks(cfg, model)
    forward = model.activation_bytes(tokens, rows, dtype)
    width = getattr(model.config, "hidden_size", None)
    inputs = again * (rows * tokens * width * dtype.itemsize if width else forward / 8)
    wide = cfg.lora_config and torch_dtype(cfg.lora_dtype).itemsize > dtype.itemsize
    return max(inputs - cfg.grad_ckpt_buffer_size, 0) + (every - again) * forward + (
        AT_WORK_FP32 if wide else AT_WORK
    ) * forward  # fmt: skip


def encode_work(cfg: TrainOptions, cost: Cost, clips: int, ranks: int) -> float:
    """Bytes that encoding a batch takes on each device of ``ranks`` that work on the same one: as many at once as
    ``encode_memory`` allows of a GPU."""
    room = parse_bytes(cfg.encode_memory or ENCODE_MEMORY, "encode_memory")
    return cost.peak * max(min(math.ceil(clips / ranks), int(room / MARGIN / cost.peak)), 1)


def encode_cost(cfg: TrainOptions, ae: Autoencoder, bucket: Bucket) -> Cost | None:
    """Of encoding a clip of a bucket; None where latents come from a cache, and where nothing is known."""
    if "ae" not in encoders_to_load(cfg):
        return None
    return ae.encode_cost((bucket.num_frames, bucket.height, bucket.width), torch_dtype(cfg.dtype))
