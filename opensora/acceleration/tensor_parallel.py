"""Tensor parallelism of the MMDiT (Megatron-LM, arXiv:1909.08053), as a table.

A column split divides a projection's outputs over ranks: each computes some heads, or some hidden channels of an MLP.
The row split after it divides inputs; the ranks' products are summed. Everything else is whole on every rank.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import Axis
from opensora.acceleration.sharding import Split, WeightLayout
from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.mmdit.layers import NORM_EPS, RMSNorm
from opensora.utils.errors import UserError

Parts = Callable[[MMDiTConfig], tuple[int, ...]]


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


# names of modules, the kind of split, and the lengths fused along the divided dimension
TABLE: tuple[tuple[str, str, Parts], ...] = (
    (r"double_blocks\.\d+\.(img|txt)_attn\.qkv", "column", _qkv),
    (r"double_blocks\.\d+\.(img|txt)_attn\.[qkv]_proj", "column", _one),
    (r"double_blocks\.\d+\.(img|txt)_attn\.proj", "row", _one),
    (r"double_blocks\.\d+\.(img|txt)_mlp\.0", "column", _hidden),
    (r"double_blocks\.\d+\.(img|txt)_mlp\.2", "row", _hidden),
    (r"single_blocks\.\d+\.linear1", "column", _qkv_and_hidden),
    (r"single_blocks\.\d+\.[qk]_proj", "column", _one),
    (r"single_blocks\.\d+\.v_mlp", "column", _one_and_hidden),
    (r"single_blocks\.\d+\.linear2", "row", _one_and_hidden),
)
# norms of single heads: whole on every rank, but each sees its own heads only
HEAD_NORMS = r"(double|single)_blocks\.\d+\.((img|txt)_attn\.)?norm\.(query|key)_norm"


class ColumnLinear(nn.Linear):
    """Some of the outputs of a linear layer; the input is whole."""

    axis: Axis

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C' / ranks]``."""
        return super().forward(collectives.copy(x, self.axis))


class RowLinear(nn.Linear):
    """A linear layer given some of its inputs; the output is whole."""

    axis: Axis

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C / ranks]`` -> ``[..., C']``."""
        out = collectives.reduce(F.linear(x, self.weight), self.axis)
        return out if self.bias is None else out + self.bias


class HeadNorm(RMSNorm):
    """RMSNorm of this rank's heads by a scale that all heads share."""

    axis: Axis

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, H / ranks, D]`` -> the same."""
        scale = collectives.copy(self.scale, self.axis)
        if self.fused is not None:
            return self.fused.apply(x, scale, NORM_EPS, 0.0, "llama", False)
        return F.rms_norm(x, scale.shape, scale, NORM_EPS)


def check_tensor_parallel(config: MMDiTConfig, ranks: int) -> None:
    """Whether a model can be divided so.

    Raises:
        UserError: heads or MLP channels that the ranks do not divide.
    """
    for name, value in (("num_heads", config.num_heads), ("mlp hidden channels", config.mlp_hidden)):
        if value % ranks:
            raise UserError(f"plugin_config.tp_size={ranks} must divide the model's {name} ({value})")


def apply_tensor_parallel(model: nn.Module, axis: Axis) -> WeightLayout:
    """Divide an MMDiT's weights over ranks, in place; keys of the state dict stay, shapes become those of a share.

    Args:
        model: see `opensora.models.mmdit.MMDiTModel`, with the same weights on every rank.
        axis: the ranks; nothing happens if there is only one.

    Returns:
        What was divided, for checkpoints and gradient norms.

    Raises:
        UserError: see `check_tensor_parallel`.
    """
    if axis.group is None:
        return WeightLayout()
    config = model.config
    assert isinstance(config, MMDiTConfig)
    check_tensor_parallel(config, axis.size)
    splits: dict[str, Split] = {}
    for name, module in list(model.named_modules()):
        for pattern, kind, parts in TABLE:
            if not re.fullmatch(pattern, name):
                continue
            if not isinstance(module, nn.Linear):
                raise UserError(
                    f"tensor parallelism cannot divide {name}, which is a {type(module).__name__}: merge adapters into "
                    "the weights first (--merge-lora True), or use plugin_config.sp_size"
                )
            splits |= _divide(name, module, kind, parts(config), axis)
        if isinstance(module, RMSNorm) and re.fullmatch(HEAD_NORMS, name):
            module.__class__, module.axis = HeadNorm, axis  # type: ignore[assignment]
    return WeightLayout(axis, splits)


def _divide(name: str, module: nn.Linear, kind: str, parts: tuple[int, ...], axis: Axis) -> dict[str, Split]:
    """Cut one layer down to this rank's share; returns what was cut, by parameter name."""
    weight = Split(0 if kind == "column" else 1, parts)
    splits = {f"{name}.weight": weight}
    module.weight = _share(module.weight, weight, axis)
    if kind == "column" and module.bias is not None:
        splits[f"{name}.bias"] = Split(0, parts)
        module.bias = _share(module.bias, Split(0, parts), axis)
    module.out_features, module.in_features = module.weight.shape
    # the class alone changes: parameters, hooks and name stay
    module.__class__ = ColumnLinear if kind == "column" else RowLinear
    module.axis = axis  # type: ignore[assignment]
    return splits


def _share(parameter: Tensor, split: Split, axis: Axis) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(split.local(parameter, axis), requires_grad=parameter.requires_grad)
