"""Tensor parallelism of the MMDiT (Megatron-LM, arXiv:1909.08053), as a table.

A column split divides a projection's outputs over ranks: each computes some heads, or some hidden channels of an MLP.
The row split after it divides inputs; the ranks' products are summed. Everything else is whole on every rank.

`apply_tensor_parallel` divides a model at once; `opensora.acceleration.colossal_policy` hands the same replacements to
ColossalAI's Shardformer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.acceleration.sharding import Split, WeightLayout
from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.mmdit.layers import NORM_EPS, RMSNorm
from opensora.utils.errors import UserError

Parts = Callable[[MMDiTConfig], tuple[int, ...]]


def _none(config: MMDiTConfig) -> tuple[int, ...]:
    return ()


def _one(config: MMDiTConfig) -> tuple[int, ...]:
    return (config.hidden_size,)


def _qkv(config: MMDiTConfig) -> tuple[int, ...]:
    return (config.hidden_size,) * 3


def _hidden(config: MMDiTConfig) -> tuple[int, ...]:
    return (config.mlp_hidden,)


def _qkv_and_hidden(config: MMDiTConfig) -> tuple[int, ...]:
    return (*_qkv(config), config.mlp_hidden)


def _one_and_hidden(config: MMDiTConfig) -> tuple[int, ...]:
    return config.hidden_size, config.mlp_hidden


class Share(nn.Module):
    """A rank's share of a module. The class of the module alone changes: parameters, hooks and name stay.

    Attributes:
        axis: the ranks.
        divided: divided dimension by name of the parameter; the others are whole on every rank.
    """

    axis: Axis
    divided: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def splits(cls, module: nn.Module, parts: tuple[int, ...]) -> dict[str, Split]:
        """How the parameters of a module are divided, by their names in it."""
        return {name: Split(dim, parts) for name, dim in cls.divided.items() if getattr(module, name) is not None}

    @classmethod
    def of(cls, module: nn.Module, axis: Axis, parts: tuple[int, ...] = ()) -> nn.Module:
        """Cut a whole module down to this rank's share, in place.

        Parameters stay the objects that they are, for optimizers and averages that hold them already.

        Args:
            module: the same on every rank.
            axis: the ranks.
            parts: lengths of the projections fused along the divided dimension.
        """
        for name, split in cls.splits(module, parts).items():
            parameter = module.get_parameter(name)
            parameter.data = split.local(parameter.data, axis)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        module.__class__, module.axis = cls, axis  # type: ignore[assignment]
        return module

    @classmethod
    def from_native_module(cls, module: nn.Module, process_group: Any, parts: tuple[int, ...] = ()) -> nn.Module:
        """`of`, as ColossalAI's Shardformer calls it."""
        return cls.of(module, Axis.of_group(process_group), parts)


class ColumnLinear(Share, nn.Linear):
    """Some of the outputs of a linear layer; the input is whole."""

    divided = {"weight": 0, "bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C' / ranks]``."""
        return F.linear(collectives.shared_sum(x, self.axis), self.weight, self.bias)


class RowLinear(Share, nn.Linear):
    """A linear layer given some of its inputs; the output is whole."""

    divided = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C / ranks]`` -> ``[..., C']``."""
        out = collectives.reduce(F.linear(x, self.weight), self.axis)
        return out if self.bias is None else out + self.bias


class HeadNorm(Share, RMSNorm):
    """RMSNorm of this rank's heads by a scale that all heads share."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, H / ranks, D]`` -> the same."""
        scale = collectives.shared_sum(self.scale, self.axis)
        if self.fused is not None:
            return self.fused.apply(x, scale, NORM_EPS, 0.0, "llama", False)
        return F.rms_norm(x, scale.shape, scale, NORM_EPS)


# names of modules, what they become, and the lengths fused along the divided dimension
TABLE: tuple[tuple[str, type[Share], Parts], ...] = (
    (r"double_blocks\.\d+\.(img|txt)_attn\.qkv", ColumnLinear, _qkv),
    (r"double_blocks\.\d+\.(img|txt)_attn\.[qkv]_proj", ColumnLinear, _one),
    (r"double_blocks\.\d+\.(img|txt)_attn\.proj", RowLinear, _one),
    (r"double_blocks\.\d+\.(img|txt)_mlp\.0", ColumnLinear, _hidden),
    (r"double_blocks\.\d+\.(img|txt)_mlp\.2", RowLinear, _hidden),
    (r"single_blocks\.\d+\.linear1", ColumnLinear, _qkv_and_hidden),
    (r"single_blocks\.\d+\.[qk]_proj", ColumnLinear, _one),
    (r"single_blocks\.\d+\.v_mlp", ColumnLinear, _one_and_hidden),
    (r"single_blocks\.\d+\.linear2", RowLinear, _one_and_hidden),
    # norms of single heads: whole on every rank, but each sees its own heads only
    (r"(double|single)_blocks\.\d+\.((img|txt)_attn\.)?norm\.(query|key)_norm", HeadNorm, _none),
)


@dataclass(frozen=True)
class Replacement:
    """What the table says about one module of a model.

    Attributes:
        name: of the module.
        target: what it becomes.
        parts: lengths of the projections fused along the divided dimension.
    """

    name: str
    target: type[Share]
    parts: tuple[int, ...]


def check_tensor_parallel(config: MMDiTConfig, ranks: int) -> None:
    """Whether a model can be divided so.

    Raises:
        UserError: heads or MLP channels that the ranks do not divide.
    """
    for name, value in (("num_heads", config.num_heads), ("mlp hidden channels", config.mlp_hidden)):
        if value % ranks:
            raise UserError(f"plugin_config.tp_size={ranks} must divide the model's {name} ({value})")


def replacements(model: nn.Module, axis: Axis) -> list[Replacement]:
    """What the table makes of a whole MMDiT's modules; nothing if there is only one rank.

    Raises:
        UserError: see `check_tensor_parallel`; or a module of another kind than the model's own.
    """
    if axis.group is None:
        return []
    config = model.config
    assert isinstance(config, MMDiTConfig)
    check_tensor_parallel(config, axis.size)
    found = []
    for name, module in model.named_modules():
        for pattern, target, parts in TABLE:
            if not re.fullmatch(pattern, name):
                continue
            if not isinstance(module, nn.Linear | RMSNorm):
                raise UserError(
                    f"tensor parallelism cannot divide {name}, which is a {type(module).__name__}: merge adapters into "
                    "the weights first (--merge-lora True), or use plugin_config.sp_size"
                )
            found.append(Replacement(name, target, parts(config)))
    return found


def layout_of(model: nn.Module, axis: Axis) -> WeightLayout:
    """How the table divides a whole MMDiT's parameters, for checkpoints and gradient norms; nothing is divided yet.

    Raises:
        UserError: see `replacements`.
    """
    return WeightLayout(
        axis,
        {
            f"{item.name}.{parameter}": split
            for item in replacements(model, axis)
            for parameter, split in item.target.splits(model.get_submodule(item.name), item.parts).items()
        },
    )


def apply_tensor_parallel(model: nn.Module, axis: Axis) -> WeightLayout:
    """Divide an MMDiT's weights over ranks, in place; keys of the state dict stay, shapes become those of a share.

    Args:
        model: see `opensora.models.mmdit.MMDiTModel`, with the same weights on every rank.
        axis: the ranks; nothing happens if there is only one.

    Returns:
        What was divided, see `layout_of`.

    Raises:
        UserError: see `replacements`.
    """
    layout = layout_of(model, axis)
    for item in replacements(model, axis):
        item.target.of(model.get_submodule(item.name), axis, item.parts)
    return layout
