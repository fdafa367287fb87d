"""Weights in 8-bit floating point (e4m3) with a scale for each row, multiplied as such where the GPU can."""

from functools import cache

import torch
from torch import Tensor

from opensora.models.quantization.kinds import Parts, RowwiseQuantizer

CAPABILITY = (8, 9)  # of NVIDIA's GPUs: Ada, Hopper and later
MULTIPLE = 16  # of both sides of a weight that they multiply


@torch.compiler.assume_constant_result
def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has matrix products of 8-bit floating point with a scale for each row."""
    return device.type == "cuda" and torch.version.hip is None and _works(device)


@cache
def _works(device: torch.device) -> bool:
    """Whether a small product does: which GPUs have kernels for it depends on the version of torch."""
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    side = torch.zeros(MULTIPLE, MULTIPLE, device=device).to(Fp8.dtype)
    scale = torch.ones(MULTIPLE, 1, device=device)
    try:
        torch._scaled_mm(side, side.t(), scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    except RuntimeError:
        return False
    return True


class Fp8(RowwiseQuantizer):
    """Absolute maximum of a row at 448. On Ada, Hopper and later, activations in bf16 are quantised likewise, token by
    token, and the product is one of fp8 numbers; elsewhere the weights are unpacked."""

    dtype = torch.float8_e4m3fn
    most = 448.0

    def linear(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        sides = parts["qweight"].shape
        fits = all(side % MULTIPLE == 0 for side in sides) and x.dtype == torch.bfloat16
        if not fits or not multiplies_fp8(x.device):
            return super().linear(x, parts, bias)
        return self.product(x, parts, bias)

    def product(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """``x`` ``[..., in]`` bf16, quantised token by token, times the weight."""
        wide = x.reshape(-1, x.shape[-1]).float()
        values, scale = self.rows(wide, wide.abs().amax(1, keepdim=True) / self.most)
        out = torch._scaled_mm(
            values, parts["qweight"].t(), scale, parts["scale"].t(), bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return out.view(*x.shape[:-1], -1)

    def works_as(self, device: torch.device) -> str:
        if multiplies_fp8(device):
            return "products of fp8 numbers, activations quantised token by token"
        return f"{super().works_as(device)}: {device} has no products of fp8 numbers"
