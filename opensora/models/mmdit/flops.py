"""How much arithmetic and memory a forward of the MMDiT takes, from its sizes alone."""

from typing import Any

import torch

from opensora.models.quantization.linear import parameter_sizes


def forward_flops(model: Any, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one forward of the MMDiT on one sample (2 per multiply-add).

    Counts the matrix products of tokens (each stream passes through its half of a double block) and attention.
    """
    config = model.config

    def weights(blocks: Any) -> int:
        # modulation works on one vector per sample, not on tokens
        sizes = parameter_sizes(blocks)
        return sum(each.numel for each in sizes if each.ndim == 2 and "mod" not in each.name.split(".")[1])

    tokens = image_tokens + text_tokens
    linear = weights(model.double_blocks) / 2 + weights(model.single_blocks)
    attention = 2 * tokens * config.hidden_size * (config.depth + config.depth_single_blocks)
    return 2.0 * tokens * (linear + attention)


def activation_bytes(model: Any, tokens: int, rows: int, dtype: torch.dtype) -> float:
    """Rough peak of one block's activations: input, q, k, v, attention output, and the MLP's hidden layer twice."""
    config = model.config
    return rows * tokens * config.hidden_size * (6 + 2 * config.mlp_ratio) * dtype.itemsize
