"""Sequence parallelism of the MMDiT: every rank holds some of the text and some of the image tokens.

The model itself is not touched: hooks on its inputs and output cut and join the tokens, and its parameter-free
attention modules are replaced. Text and image are each cut into equal parts, the last ones filled up with zeros where
the count does not divide; fillers are kept out of attention and dropped from the output, so no token count is refused
and none changes the result.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.acceleration.ring import ring_attention, ring_kernel
from opensora.models.diffusion import row_sizes
from opensora.models.mmdit.attention import JointAttention
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

MODES = {"all_to_all": "Ulysses", "ring_attn": "ring"}
DEFAULT_MODE = "auto"
IMAGE_INPUTS, TEXT_INPUTS = ("img", "img_ids", "cond"), ("txt", "txt_ids")


class Part(NamedTuple):
    """How many tokens of one stream the ranks hold: ``size`` each, of which ``valid[rank]`` are not fillers."""

    size: int
    valid: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, ranks: int) -> "Part":
        """Division of a stream into equal parts."""
        size = max(-(-tokens // ranks), 1)
        return cls(size, tuple(min(max(tokens - rank * size, 0), size) for rank in range(ranks)))


class Layout(NamedTuple):
    """Tokens of a rank: its text, then its image part."""

    txt: Part
    img: Part

    @property
    def size(self) -> int:
        """Tokens that each rank holds, with fillers."""
        return self.txt.size + self.img.size

    @property
    def full(self) -> bool:
        """Whether there are no fillers."""
        return min(self.txt.valid) == self.txt.size and min(self.img.valid) == self.img.size

    def lengths(self) -> list[int]:
        """Tokens of each rank without fillers."""
        return [txt + img for txt, img in zip(self.txt.valid, self.img.valid)]

    def spans(self) -> list[tuple[int, int, bool]]:
        """All tokens in the order of ranks as runs ``(start, length, is_valid)``."""
        runs, start = [], 0
        for rank in range(len(self.txt.valid)):
            for part in self:
                valid = part.valid[rank]
                runs += [(start, valid, True), (start + valid, part.size - valid, False)]
                start += part.size
        return [run for run in runs if run[1]]

    def drop_fillers(self, x: Tensor) -> Tensor:
        """Tokens of all ranks ``[B, ranks * size, ...]`` without fillers."""
        return torch.cat([x.narrow(1, start, length) for start, length, valid in self.spans() if valid], dim=1)

    def add_fillers(self, x: Tensor) -> Tensor:
        """Inverse of `drop_fillers`, with zeros."""
        rows, at = [], 0
        for _, length, valid in self.spans():
            rows.append(x.narrow(1, at, length) if valid else x.new_zeros(x.shape[0], length, *x.shape[2:]))
            at += length if valid else 0
        return torch.cat(rows, dim=1)

    def fillers_last(self, x: Tensor, rank: int) -> Tensor:
        """One rank's tokens ``[B, size, ...]`` with its fillers moved to the end."""
        txt, img = self.txt.valid[rank], self.img.valid[rank]
        if txt == self.txt.size:
            return x
        return torch.cat((x[:, :txt], x[:, self.txt.size : self.txt.size + img], x[:, txt : self.txt.size],
                          x[:, self.txt.size + img :]), dim=1)  # fmt: skip


class TokenShard:
    """What the hooks and attention modules of one model share: ranks, ring kernel, layout of the current forward."""

    def __init__(self, axis: Axis, kernel: str) -> None:
        self.axis, self.kernel = axis, kernel
        self.layout: Layout | None = None


class _ParallelAttention(JointAttention):
    def __init__(self, replaced: JointAttention, shard: TokenShard) -> None:
        super().__init__(replaced.backend, replaced.half_split, replaced.rope_backend, replaced.lenient)
        self.shard = shard

    @property
    def layout(self) -> Layout:
        """Layout of the current forward."""
        assert self.shard.layout is not None, "attention ran outside of the model's forward"
        return self.shard.layout


class UlyssesAttention(_ParallelAttention):
    """DeepSpeed Ulysses (arXiv:2309.14509): in attention a rank holds all tokens of some heads.

    Heads (of this rank's weights) must be divisible by the number of ranks.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `JointAttention.attend`; tokens are this rank's."""
        layout, axis = self.layout, self.shard.axis
        batch, length, heads, dim = q.shape
        _check_heads(heads, axis.size)
        joined = torch.stack((q, k, v)).unflatten(3, (axis.size, heads // axis.size))  # [3, B, L, ranks, H', D]
        joined = collectives.all_to_all(joined.permute(3, 0, 1, 2, 4, 5), axis)  # [ranks, 3, B, L, H', D]
        qkv = joined.permute(1, 2, 0, 3, 4, 5).reshape(3, batch, axis.size * length, heads // axis.size, dim).unbind()
        if not layout.full:
            qkv = tuple(layout.drop_fillers(x) for x in qkv)
        out = self.kernel(*qkv)
        if not layout.full:
            out = layout.add_fillers(out)
        out = collectives.all_to_all(out.unflatten(1, (axis.size, length)).transpose(0, 1), axis)
        return out.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, L, ranks, H', D] -> [B, L, H, D]


class RingAttention(_ParallelAttention):
    """Ring attention, see `opensora.acceleration.ring`: keys and values travel around the ranks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `JointAttention.attend`; tokens are this rank's."""
        layout, axis = self.layout, self.shard.axis
        k, v = (layout.fillers_last(x, axis.rank) for x in (k, v))
        return ring_attention(q, k, v, layout.lengths(), axis, self.shard.kernel)


def _check_heads(heads: int, ranks: int) -> None:
    if heads % ranks:
        raise UserError(
            f"sequence parallelism by all_to_all needs attention heads divisible by its ranks: {heads} heads, {ranks} "
            "ranks; use --plugin_config.sequence_parallelism_mode ring_attn, which takes any number"
        )


def chosen_mode(mode: str | None, heads: int, ranks: int) -> str:
    """The mode that ``auto`` (or None) stands for; any other as it is.

    ``all_to_all`` where the heads of a rank's weights can be divided over the ranks: it sends less, and attention is
    that of one device, with its fastest kernel. Otherwise the ring, which takes any number of heads.
    """
    if mode is not None and mode != DEFAULT_MODE:
        return mode
    return "ring_attn" if heads % ranks else "all_to_all"


def check_mode(mode: str | None, heads: int, ranks: int, kernel: str) -> None:
    """Whether a model can be divided so.

    Args:
        mode: ``all_to_all``, ``ring_attn`` or ``auto``, see `chosen_mode`.
        heads: attention heads of one rank's weights.
        ranks: of the sequence-parallel group.
        kernel: ``attn_backend`` of the model.

    Raises:
        UserError: an unknown mode, heads that cannot be divided, or a kernel that the ring cannot use.
    """
    mode = chosen_mode(mode, heads, ranks)
    if mode not in MODES:
        valid = ", ".join((DEFAULT_MODE, *MODES))
        raise UserError(f"plugin_config.sequence_parallelism_mode={mode!r} is unknown; valid: {valid}")
    if mode == "all_to_all":
        _check_heads(heads, ranks)
    else:
        ring_kernel(kernel)


def apply_sequence_parallel(
    model: nn.Module, axis: Axis, mode: str | None = DEFAULT_MODE, heads: int | None = None
) -> nn.Module:
    """Make an MMDiT divide its tokens over ranks, in place; keys of the state dict stay as they are.

    Every rank calls the model with the same whole inputs and gets the whole output. Averaged over the ranks, the
    gradients of the parameters and inputs are those of one process.

    Args:
        model: see `opensora.models.mmdit.MMDiTModel`; with tensor parallelism, that comes first.
        axis: the ranks; nothing happens if there is only one.
        mode: ``all_to_all`` (Ulysses), ``ring_attn`` or ``auto``, see `chosen_mode`.
        heads: attention heads of this rank's weights; None: all of the model's.

    Raises:
        UserError: see `check_mode`.
    """
    if axis.group is None:
        return model
    config: Any = model.config
    heads = heads or config.num_heads
    check_mode(mode, heads, axis.size, config.attn_backend)
    mode = chosen_mode(mode, heads, axis.size)
    logger.info("sequence parallelism over %d ranks by %s", axis.size, mode)
    by_ring = mode == "ring_attn"
    shard = TokenShard(axis, ring_kernel(config.attn_backend) if by_ring else config.attn_backend)
    kind = RingAttention if by_ring else UlyssesAttention
    for owner in [module for module in model.modules() if isinstance(getattr(module, "attention", None), nn.Module)]:
        owner.attention = kind(owner.attention, shard)  # type: ignore[arg-type]
    signature = inspect.signature(model.forward)

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        inputs = signature.bind(*args, **kwargs).arguments
        shard.layout = Layout(*(Part.of(inputs[name].shape[1], axis.size) for name in ("txt", "img")))
        return (), {name: _cut_input(name, value, shard.layout, axis) for name, value in inputs.items()}

    def join(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        assert shard.layout is not None
        whole, tokens = collectives.gather(out, axis, dim=1), sum(shard.layout.img.valid)
        return whole if whole.shape[1] == tokens else whole[:, :tokens].clone()

    model.register_forward_pre_hook(cut, with_kwargs=True)
    model.register_forward_hook(join, with_kwargs=True)
    model.recompute = _remember_layout(model.recompute, shard)  # type: ignore[assignment, arg-type]
    model.row_sizes = partial(_sizes_on_all_ranks, shard)  # type: ignore[assignment]
    return model


def _cut_input(name: str, value: Any, layout: Layout, axis: Axis) -> Any:
    """This rank's part of one input of the model."""
    if not isinstance(value, Tensor):
        return value
    if name in IMAGE_INPUTS or name in TEXT_INPUTS:
        part = layout.img if name in IMAGE_INPUTS else layout.txt
        filled = F.pad(value, (0, 0, 0, part.size * axis.size - value.shape[1]))
        return collectives.split(filled, axis, dim=1)
    return collectives.shared_mean(value, axis) if value.requires_grad else value


def _sizes_on_all_ranks(shard: TokenShard, x: Tensor) -> Tensor:
    """:func:`opensora.models.diffusion.row_sizes` of image tokens whose other parts are on other ranks."""
    assert shard.layout is not None
    own = row_sizes(x[:, : shard.layout.img.valid[shard.axis.rank]])
    return collectives.all_reduce(own, shard.axis)


def _remember_layout(recompute: Callable[..., Any], shard: TokenShard) -> Callable[..., Any]:
    """Recompute blocks under the layout of their forward: another forward may have come in between."""

    def run(block: nn.Module, *args: Any) -> Any:
        layout = shard.layout

        def under_layout(*inputs: Any) -> Any:
            before, shard.layout = shard.layout, layout
            try:
                return block(*inputs)
            finally:
                shard.layout = before

        return recompute(under_layout, *args)

    return run
