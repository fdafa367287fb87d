"""Weights in 8-bit integers with a scale for each row: half the room of bf16."""

import torch

from opensora.models.quantization.kinds import RowwiseQuantizer


class Int8(RowwiseQuantizer):
    """Absolute maximum of a row at 127, round to nearest; activations stay as they are."""

    dtype = torch.int8
    most = 127.0
