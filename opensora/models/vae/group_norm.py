"""Group normalisation of large tensors on a GPU.

torch's kernel gives each group of a sample to one block of threads: 32 for a video of a batch of one, on a card that
runs a hundred times as many. Here the sums are reductions over the whole card, and the normalisation is a scale and a
shift of every channel and frame, each of which torch spreads over the card.
"""

import torch
from torch import Tensor, nn


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``norm(x)`` of ``[B, C, ...]``: by torch's own kernel on a CPU, where gradients are wanted, and in compiled code.

    Elsewhere the results differ by rounding only: sums are in float32 (float64 for float64).
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()  # a compiled one is a kernel of its own
    if x.is_cuda and x.ndim > 2 and x.is_contiguous() and not plain:
        return spread_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return norm(x)


def spread_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation made of sums and of one scale and shift per channel; no gradients.

    Args:
        x: ``[B, C, L]`` or ``[B, C, ..., L]``, contiguous.
        groups: of consecutive channels.
        weight, bias: ``[C]``.
        eps: added to the variance.
    """
    batch, channels = x.shape[:2]
    exact = torch.promote_types(x.dtype, torch.float32)
    mean, variance = (value.repeat_interleave(channels // groups, dim=1).to(exact) for value in _moments(x, groups))
    planes = x.numel() // (batch * channels * x.shape[3:].numel()) if x.ndim > 3 else 1  # frames of a clip

    def each(value: Tensor) -> Tensor:
        """Of ``[B, C]``, one value for every plane."""
        return value.expand(batch, channels)[..., None].expand(-1, -1, planes).reshape(-1)

    # Inference of a batch normalisation whose channels are all planes: it takes 16-bit values with float32 moments.
    flat = x.view(1, batch * channels * planes, -1)
    scale, shift = each(weight.to(exact)), each(bias.to(exact))
    out = torch.native_batch_norm(flat, scale, shift, each(mean), each(variance), False, 0.0, eps)[0]
    return out.view(x.shape)


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[B, G]`` of each group."""
    rows = x.view(x.shape[0], groups, -1)
    if x.dtype not in (torch.float16, torch.bfloat16):
        variance, mean = torch.var_mean(rows, dim=-1, correction=0)
        return mean, variance
    # Read in 16 bits and added in 32 by one kernel each, where var_mean would round its results to 16. What the
    # difference of squares loses is below the values' own rounding: 2^-24 against 2^-8 of the mean.
    count = rows.shape[-1]
    mean = rows.sum(-1, dtype=torch.float32).double() / count
    norm = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).double()
    return mean, (norm.square() / count - mean.square()).clamp(min=0)
