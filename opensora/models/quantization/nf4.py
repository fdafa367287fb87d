"""Weights in 4-bit NormalFloat (QLoRA, arXiv:2305.14314), by bitsandbytes: 4.25 bits a weight."""

import math
from functools import cache

import torch
from torch import Tensor

from opensora.models.quantization.kinds import Part, Parts, Quantizer
from opensora.utils.optional import BITSANDBYTES, BITSANDBYTES_HINT, import_bitsandbytes

BLOCK = 64  # weights, in the order of memory, that share a scale
_library = cache(import_bitsandbytes)  # registers the operators
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that bitsandbytes knows


class Nf4(Quantizer):
    """Two weights a byte, ``qweight`` ``[out, in / 2]``, and ``absmax`` of every 64."""

    package = (BITSANDBYTES, f"{BITSANDBYTES_HINT}, or choose int8, which needs nothing")

    def fits(self, rows: int, columns: int) -> bool:
        return columns % 2 == 0

    def layout(self, rows: int, columns: int) -> dict[str, Part]:
        blocks = math.ceil(rows * columns / BLOCK)
        return {"qweight": Part((rows, columns // 2), torch.uint8), "absmax": Part((blocks,), torch.bfloat16)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        _library()
        rows, columns = weight.shape
        known = weight if weight.dtype in DTYPES else weight.float()
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(known.contiguous(), BLOCK, "nf4", torch.uint8)
        return {"qweight": packed.view(rows, columns // 2), "absmax": absmax.bfloat16()}

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        packed = parts["qweight"]
        shape = (packed.shape[0], 2 * packed.shape[1])
        absmax, known = parts["absmax"].float(), dtype if dtype in DTYPES else torch.float32
        return torch.ops.bitsandbytes.dequantize_4bit(packed.view(-1, 1), absmax, BLOCK, "nf4", shape, known).to(dtype)
