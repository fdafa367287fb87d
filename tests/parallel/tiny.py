"""A tiny MMDiT, its inputs, and one training step on them: the same on every rank."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.models.mmdit import MMDiTConfig, MMDiTModel

SIZES = {
    "in_channels": 8,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [4, 2, 2],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "cond_embed": True,
    "fused_qkv": False,
    "use_liger_rope": True,
}


def tiny_model(dtype: torch.dtype = torch.float32, **overrides: Any) -> MMDiTModel:
    """The same random weights at every call, conditions included."""
    generator = torch.Generator().manual_seed(1)
    model = MMDiTModel(MMDiTConfig(**{**SIZES, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.7 * parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + name.endswith(".scale"))
    return model.to(dtype)


def tiny_inputs(
    image: int = 13, text: int = 5, batch: int = 2, seed: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of the model for the given numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    ids = torch.stack([torch.arange(image) // 6, torch.arange(image) // 3 % 2, torch.arange(image) % 3], dim=-1)
    return {
        "img": random(batch, image, 8),
        "img_ids": ids.float().expand(batch, -1, -1),
        "txt": random(batch, text, 20),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.rand(batch, generator=generator).to(dtype),
        "y_vec": random(batch, 12),
        "cond": random(batch, image, 12),
    }


def loss_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """A loss that weighs every token differently."""
    out = model(**inputs).float()
    weight = torch.linspace(-1, 1, out[0].numel()).reshape(out.shape[1:])
    return 10 * ((out * weight).mean() + out.square().mean())


@cache
def context(**sizes: int) -> ParallelContext:
    """Groups of this test's processes."""
    return ParallelContext.create(Sizes(**sizes))


def mean_over(x: Tensor, group: Any) -> Tensor:
    """Average over the ranks of a group."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
