"""Videos made by several processes together beside those of one."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.acceleration.parallel_vae import share_tiles
from opensora.acceleration.torchrun import Torchrun
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.config.options import PluginOptions
from opensora.diffusion import loading
from opensora.diffusion.pipeline import SampleResult, VideoPipeline
from opensora.generation.run import generate
from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights_writing import save_safetensors
from tests.conftest import tiny_inference_config
from tests.parallel.harness import assert_close
from tests.parallel.tiny import context

TILES = {"ae.use_spatial_tiling": True, "ae.use_temporal_tiling": True, "ae.sample_size": 16, "ae.sample_tsize": 8}
PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
CPU = torch.device("cpu")


def sample(parallel: ParallelContext | None, picture: bool, **overrides: Any) -> SampleResult:
    overrides = {"num_steps": 3, "sampling_option.image_osci": True, **TILES, **overrides}
    pipe = VideoPipeline.from_config(tiny_inference_config(), CPU, parallel, **overrides)
    given: dict[str, Any] = {"ref": PICTURE, "cond_type": "i2v_head"} if picture else {}
    return pipe(["a", "b"] if not picture else "a", seed=5, **given)


@functools.cache
def alone(picture: bool, quantize: str | None = None) -> SampleResult:
    return sample(None, picture, **{"model.quantize": quantize})


def compare(picture: bool = True, mode: str = "ring_attn", quantize: str | None = None, **sizes: int) -> None:
    found = sample(
        context(**sizes), picture, plugin="hybrid", plugin_ae="hybrid",
        **{"plugin_config.sequence_parallelism_mode": mode, "model.quantize": quantize},
    )  # fmt: skip
    expected_result = alone(picture, quantize)
    assert_close(found.latents, expected_result.latents, f"{sizes} latents")
    for made, expected in zip(found.frames, expected_result.frames):
        assert np.abs(made.astype(int) - expected).max() <= 1


def sequence_parallel(folder: Path) -> None:
    compare(mode="all_to_all", sp=2)
    compare(picture=False, sp=2)


def quantized_weights(folder: Path) -> None:
    """Every process has all of them; they are unpacked to the same numbers everywhere."""
    compare(quantize="int8", sp=2)


def tensor_parallel(folder: Path) -> None:
    compare(tp=2)


def parts_of_weights(folder: Path) -> None:
    """Tensor-parallel ranks that read only what they keep make the video of one process."""
    path = folder / "model.safetensors"
    if dist.get_rank() == 0:
        torch.manual_seed(1)
        save_safetensors(build_module(tiny_inference_config()["model"], MODELS).state_dict(), path)
    dist.barrier()
    source = {"model.from_pretrained": str(path)}
    with mock.patch.object(loading, "materialise", wraps=loading.materialise) as filled:
        found = sample(context(tp=2), True, plugin="hybrid", **source)
    assert filled.call_count == 1
    assert_close(found.latents, sample(None, True, **source).latents, "latents")


def branches(folder: Path) -> None:
    """Three branches with a picture, two without."""
    compare(branch=2)
    compare(picture=False, branch=2)


def step_cache(folder: Path) -> None:
    """What is left out, and how much, is what one process leaves out, whoever has which branch or token."""
    expected = sample(None, picture=True, step_cache=5.0)
    assert 0 < expected.reused[0] < 1
    for sizes in ({"branch": 2}, {"sp": 2}):
        found = sample(context(**sizes), picture=True, step_cache=5.0, plugin="hybrid", plugin_ae="hybrid")
        assert_close(found.latents, expected.latents, f"{sizes} latents")
        assert found.reused == expected.reused


def branches_and_tokens(folder: Path) -> None:
    compare(branch=2, sp=2)


def tiles_of_the_autoencoder(folder: Path) -> None:
    """Bit for bit one process's tiled result, encoding and decoding."""
    torch.manual_seed(0)
    config = HunyuanVAEConfig(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
        sample_size=16, sample_tsize=8, use_spatial_tiling=True, use_temporal_tiling=True,
    )  # fmt: skip
    ae = AutoencoderKLCausal3D(config).eval()
    x = torch.randn(1, 3, 17, 40, 24)
    with torch.no_grad():
        moments = ae.encode_moments(x)
        pixels = ae.decode(moments[:, :4])
        count = 0
        run = ae.decoder.forward

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return run(*args)

        ae.decoder.forward = counted  # type: ignore[method-assign]
        ae.decode(moments[:, :4])
        tiles, count = count, 0
        share_tiles(ae, context().dp)
        assert torch.equal(ae.encode_moments(x), moments)
        assert torch.equal(ae.decode(moments[:, :4]), pixels)
        assert count < 0.7 * tiles, (count, tiles)


def command(folder: Path) -> None:
    """The first rank of a group writes; sizes beyond the number of processes are fitted to it, and the log says so."""
    lines: list[str] = []
    logger = get_logger("opensora.acceleration.parallel_context")
    logger.info = lambda text, *values: lines.append(text % values)  # type: ignore[method-assign]
    options = {"plugin": "hybrid", "plugin_config.sp_size": 8, "prompt": "a", "num_steps": 1}
    cfg = load_config(tiny_inference_config(), InferenceOptions, {**options, "save_dir": str(folder / "samples")})
    made = generate(cfg, CPU, Torchrun(dist.get_rank(), world_size=2), log=lambda line: None)
    assert [path.name for path in made] == (["prompt_0000.mp4"] if dist.get_rank() == 0 else [])
    assert any("sp_size=8 asked for, 2 used" in line for line in lines)


def sizes_fit_the_processes(folder: Path) -> None:
    assert Sizes(tp=8).fit(4) == Sizes(tp=4)
    assert Sizes(sp=8, tp=2).fit(6) == Sizes(tp=2, sp=3)
    assert Sizes(sp=4).fit(1) == Sizes()
    assert Sizes.of("none", PluginOptions(sp_size=8)) == Sizes()
    assert Sizes.of("hybrid", PluginOptions(sp_size=8)) == Sizes(sp=8)
    for size in (0, -1):
        with pytest.raises(UserError, match=f"plugin_config.sp_size={size}: must be at least 1"):
            load_config({}, InferenceOptions, {"plugin_config.sp_size": size})


CHECKS = [
    sequence_parallel,
    quantized_weights,
    tensor_parallel,
    parts_of_weights,
    branches,
    step_cache,
    tiles_of_the_autoencoder,
    command,
    sizes_fit_the_processes,
]
FOUR = [branches_and_tokens]
