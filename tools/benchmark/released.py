"""The models at their released sizes on a GPU, with random weights: speed, rate of arithmetic and memory."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opensora.benchmark.measuring import MIB, peak_of, seconds_of
from opensora.datasets.aspect import get_image_size
from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.mmdit import MMDiTModel
from tools.benchmark.cases import Sizes, mmdit_config, transformer_inputs, vae_input

TERA = 1e12
RELEASED = {"256px": get_image_size("256px", "16:9"), "768px": get_image_size("768px", "16:9")}
RELEASED_FRAMES, RELEASED_TEXT = 129, 512


def released_sizes(resolution: str) -> Sizes:
    """The released models at a resolution: 129 frames, 16:9."""
    height, width = RELEASED[resolution]
    latent = ((RELEASED_FRAMES - 1) // 4 + 1, height // 8, width // 8)
    video = (RELEASED_FRAMES, height, width)
    return Sizes(torch.bfloat16, 3072, 19, 38, RELEASED_TEXT, latent, (128, 256, 512, 512), video)


def released_model(sizes: Sizes, device: torch.device, attn_backend: str = "sdpa") -> MMDiTModel:
    """The 11B model with random weights, never held in a wider dtype than its own; for "meta" without weights."""
    config = mmdit_config(
        sizes.hidden, sizes.depth, sizes.depth_single, fused=False, cond_embed=True, attn_backend=attn_backend
    )
    with torch.device("meta"):
        model = MMDiTModel(config).to(sizes.dtype)
    if device.type == "meta":
        return model
    model = model.to_empty(device=device)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    return model


def released_inputs(model: MMDiTModel, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Random inputs of the 11B model for one sample, condition included."""
    inputs = transformer_inputs(sizes, device)
    shape = (*inputs["img"].shape[:2], model.config.cond_channels)
    return inputs | {"cond": torch.randn(shape, device=device, dtype=sizes.dtype)}


def forward_flops(sizes: Sizes) -> int:
    """Floating-point operations of one forward of the 11B model: its matrix products, attention included."""
    meta = torch.device("meta")
    model = released_model(sizes, meta, attn_backend="math")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**released_inputs(model, sizes, meta))
    return counter.get_total_flops()


def matrix_rate(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """Floating-point operations per second that a large bfloat16 matrix product reaches."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = partial(torch.matmul, a, b)
    product()
    return 2 * size**3 / statistics.median(seconds_of(product, device) for _ in range(repeats))


def measure_released(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Median time and peak memory of a run, or that the card is too small for it."""
    try:
        with torch.no_grad():
            with peak_of(device) as peak:
                run()
                torch.cuda.synchronize(device)
            times = [seconds_of(run, device) for _ in range(repeats)]
        return {"seconds": times, "median_s": statistics.median(times), "peak_mib": peak[0] / MIB}
    except torch.OutOfMemoryError:
        pass  # its traceback holds on to tensors until here is left
    torch.cuda.empty_cache()
    return {"error": "out of memory"}


def released(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The released sizes on a GPU: forwards of the 11B model with the rate they reach, and decoding of the latents."""
    rate, rows = matrix_rate(device), []
    model = released_model(released_sizes("256px"), device).eval()
    for resolution in RELEASED:
        sizes = released_sizes(resolution)
        flops = forward_flops(sizes)
        run = partial(model, **released_inputs(model, sizes, device))
        row = {"case": f"11B forward, {resolution}", **measure_released(run, device, repeats)}
        if "median_s" in row:
            reached = flops / row["median_s"]
            row |= {"tflops": reached / TERA, "matrix_tflops": rate / TERA, "share_of_matrix_rate": reached / rate}
        rows.append(row)
    del model, run
    torch.cuda.empty_cache()
    for resolution in RELEASED:
        z = vae_input(released_sizes(resolution), device, decode=True)
        for tiled in (True, False):  # the shipped configs decode in spatial tiles
            config = HunyuanVAEConfig(use_spatial_tiling=tiled)
            decoder = AutoencoderKLCausal3D(config).to(device, torch.bfloat16).eval()
            case = f"VAE decode, {resolution}, {'spatial tiles' if tiled else 'untiled'}"
            rows.append({"case": case, **measure_released(partial(decoder.decode, z), device, repeats)})
    return rows
