"""Inputs of the diffusion model as training makes them."""

import pytest
import torch

from opensora.config.options import LossWeightingOptions, TimeSamplingOptions
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


def test_samples_weigh_by_time_and_condition(tiny_config):
    torch.manual_seed(0)
    encoders = [build_module(dict(tiny_config[k]), MODELS, torch_dtype=torch.float32) for k in ("ae", "t5", "clip")]
    batch = {"video": torch.randn(6, 3, 9, 32, 32).clamp(-1, 1), "text": list("abcdef"), "index": range(6)}
    drawn = {"t2v": 1.0, "i2v_head": 1.0, "i2v_tail": 1.0}

    def encoded(**weighting):
        options = InputOptions(condition_weights=drawn, loss_weighting=LossWeightingOptions(**weighting))
        return InputEncoder(*encoders, options)(dict(batch), torch.Generator().manual_seed(4))

    plain, both = encoded(), encoded(time="sigma_sqrt", conditions={"t2v": 0.0, "i2v_head": 3.0})
    assert plain["weights"] is None
    given = plain["inputs"]["cond"].view(6, 3, 4, -1)[:, :, 0, :4].bool().any(-1)  # [sample, frame]
    types = [{(False, False, False): "t2v", (True, False, False): "i2v_head"}.get(tuple(row.tolist())) for row in given]
    assert len(set(types)) == 3  # all were drawn
    assert [name or "i2v_tail" for name in types] == both["conditions"]
    times = both["inputs"]["timesteps"]
    assert torch.equal(times, plain["inputs"]["timesteps"])
    expected = [{"t2v": 0.0, "i2v_head": 3.0}.get(name, 1.0) / float(t) ** 2 for name, t in zip(types, times)]
    assert both["weights"].tolist() == pytest.approx(expected, rel=1e-5)


def test_times_are_drawn_as_the_config_says(tiny_config):
    encoders = [build_module(dict(tiny_config[k]), MODELS, torch_dtype=torch.float32) for k in ("ae", "t5", "clip")]
    batch = {"video_latents": torch.randn(64, 4, 1, 4, 4), "text": ["a"] * 64}
    options = InputOptions(time_sampling=TimeSamplingOptions(mean=-4.0, width=0.1, shift=False))
    times = InputEncoder(*encoders, options)(batch, torch.Generator().manual_seed(0))["inputs"]["timesteps"]
    assert times.mean().item() == pytest.approx(0.018, abs=0.002)
