"""Inputs of the diffusion model as training makes them."""

import pytest
import torch

from opensora.diffusion.flow import interpolate, sample_timesteps
from opensora.diffusion.latents import pack
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.inputs import InputEncoder, InputOptions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_told_the_time_that_its_input_was_mixed_at(tiny_config, dtype):
    """In bf16 the time is rounded, once for both."""
    torch.manual_seed(0)
    encoders = [build_module(dict(tiny_config[k]), MODELS, torch_dtype=dtype) for k in ("ae", "t5", "clip")]
    encode = InputEncoder(*encoders, InputOptions())
    x_0 = torch.randn(3, 4, 3, 4, 4).to(dtype)
    batch = {"video_latents": x_0, "text": ["a", "b", "c"]}
    inputs = encode(batch, torch.Generator().manual_seed(1))["inputs"]
    generator = torch.Generator().manual_seed(1)
    torch.rand(2, 3, generator=generator)  # dropout of both texts
    drawn = sample_timesteps(3, 4, 3, generator)
    noise = torch.randn(x_0.shape, generator=generator).to(x_0)
    told = inputs["timesteps"]
    assert told.dtype == dtype
    assert torch.equal(told, drawn.to(dtype))
    assert torch.equal(inputs["img"], pack(interpolate(x_0, noise, told), 2))
