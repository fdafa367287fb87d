"""The implementations that are compared, ready to run with random weights and inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.diffusion.latents import prepare_ids
from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.utils.optional import require

BASELINE = "diffusers"
HEAD_DIM, AXES = 128, [16, 56, 56]
TEXT_WIDTH, VECTOR_WIDTH, TOKEN_WIDTH = 4096, 768, 64
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Sizes:
    """What is run on a kind of device: seconds on two CPU cores, a good load on a GPU.

    Args:
        dtype: of weights and activations.
        hidden, depth, depth_single: width and blocks of the MMDiT.
        text: text tokens.
        latent: latent (frames, rows, columns) of the MMDiT, before packing by 2 x 2.
        channels: widths of the autoencoder.
        video: (frames, height, width) of its pixels.
    """

    dtype: torch.dtype
    hidden: int
    depth: int
    depth_single: int
    text: int
    latent: tuple[int, int, int]
    channels: tuple[int, ...]
    video: tuple[int, int, int]


SIZES = {
    "cpu": Sizes(torch.float32, 768, 2, 4, 64, (3, 32, 32), (64, 128, 256, 256), (17, 64, 64)),
    "cuda": Sizes(torch.bfloat16, 3072, 4, 8, 512, (33, 24, 42), (128, 256, 512, 512), (33, 256, 256)),
}


@dataclass(frozen=True)
class Contestant:
    """An implementation, ready to run."""

    model: nn.Module
    run: Callable[[], Any]


def diffusers_module() -> Any:
    """The package diffusers, told not to warn about dtypes that only matter to loaded weights.

    Raises:
        UserError: it is not installed.
    """
    diffusers = require("diffusers", "the comparison", "`pip install -r requirements-dev.txt`")
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def transformer_inputs(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Random inputs of an MMDiT for one sample, by the names of its ``forward``."""
    frames, rows, columns = sizes.latent
    img_ids, txt_ids = prepare_ids(1, sizes.latent, 2, sizes.text, device, torch.float32)
    options: dict[str, Any] = dict(device=device, dtype=sizes.dtype)
    return {
        "img": torch.randn(1, frames * rows * columns // 4, TOKEN_WIDTH, **options),
        "img_ids": img_ids,
        "txt": torch.randn(1, sizes.text, TEXT_WIDTH, **options),
        "txt_ids": txt_ids,
        "timesteps": torch.full((1,), 0.7, **options),
        "y_vec": torch.randn(1, VECTOR_WIDTH, **options),
    }


def steps(model: nn.Module, forward: Callable[[], Tensor], backward: bool) -> Callable[[], None]:
    """The run of a transformer: its forward, and the backward from the mean square of the output if asked for."""

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = forward()
        if backward:
            model.zero_grad(set_to_none=True)
            out.float().square().mean().backward()

    return run


def mmdit(sizes: Sizes, device: torch.device, backward: bool, fused: bool) -> Contestant:
    """Our MMDiT: fused projections and interleaved rotary layout (FLUX.1), or split and half-split (Open-Sora 2.0)."""
    config = mmdit_config(sizes.hidden, sizes.depth, sizes.depth_single, fused, cond_embed=False)
    model = MMDiTModel(config).to(device, sizes.dtype)
    inputs = transformer_inputs(sizes, device)
    return Contestant(model, steps(model, partial(model, **inputs), backward))


def mmdit_config(hidden: int, depth: int, depth_single: int, fused: bool, **others: Any) -> MMDiTConfig:
    """Config of an MMDiT with the released model's inputs and heads."""
    return MMDiTConfig(
        in_channels=TOKEN_WIDTH,
        vec_in_dim=VECTOR_WIDTH,
        context_in_dim=TEXT_WIDTH,
        hidden_size=hidden,
        mlp_ratio=4.0,
        num_heads=hidden // HEAD_DIM,
        depth=depth,
        depth_single_blocks=depth_single,
        axes_dim=AXES,
        theta=10_000,
        qkv_bias=True,
        guidance_embed=False,
        fused_qkv=fused,
        use_liger_rope=not fused,
        **others,
    )


def flux_config(sizes: Sizes) -> dict[str, Any]:
    """Arguments of diffusers' ``FluxTransformer2DModel`` for these sizes."""
    return dict(
        in_channels=TOKEN_WIDTH,
        num_layers=sizes.depth,
        num_single_layers=sizes.depth_single,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=sizes.hidden // HEAD_DIM,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=VECTOR_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=tuple(AXES),
    )


def flux_call(model: nn.Module, sizes: Sizes, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """A forward of that model on the inputs of `transformer_inputs`."""
    inputs = transformer_inputs(sizes, device)
    return partial(
        model,
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y_vec"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        return_dict=False,
    )


def flux(sizes: Sizes, device: torch.device, backward: bool) -> Contestant:
    """diffusers' Flux transformer."""
    model = diffusers_module().FluxTransformer2DModel(**flux_config(sizes)).to(device, sizes.dtype)
    call = flux_call(model, sizes, device)
    return Contestant(model, steps(model, lambda: call()[0], backward))


def vae_input(sizes: Sizes, device: torch.device, decode: bool) -> Tensor:
    """Random video ``[1, 3, T, H, W]``, or random latents of one."""
    frames, height, width = sizes.video
    shape = (LATENT_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8) if decode else (3, *sizes.video)
    return torch.randn(1, *shape, device=device, dtype=sizes.dtype)


def vae(sizes: Sizes, device: torch.device, decode: bool) -> Contestant:
    """Our causal video autoencoder, untiled."""
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(block_out_channels=[*sizes.channels])).to(device, sizes.dtype).eval()
    x = vae_input(sizes, device, decode)
    call = partial(model.decode, x) if decode else partial(model.encode, x, sample_posterior=False)
    return Contestant(model, torch.no_grad()(call))


def vae_diffusers(sizes: Sizes, device: torch.device, decode: bool) -> Contestant:
    """diffusers' causal video autoencoder, untiled."""
    model = diffusers_module().AutoencoderKLHunyuanVideo(block_out_channels=sizes.channels)
    model.use_framewise_encoding = model.use_framewise_decoding = False
    model = model.to(device, sizes.dtype).eval()
    x = vae_input(sizes, device, decode)
    call = partial(model.decode if decode else model.encode, x)
    return Contestant(model, torch.no_grad()(call))


Build = Callable[[Sizes, torch.device], Contestant]


def transformers(backward: bool) -> dict[str, Build]:
    """Implementations of the transformer."""
    return {
        "ours, fused": partial(mmdit, backward=backward, fused=True),
        "ours, split": partial(mmdit, backward=backward, fused=False),
        BASELINE: partial(flux, backward=backward),
    }


CASES: Mapping[str, Mapping[str, Build]] = {
    "MMDiT forward": transformers(backward=False),
    "MMDiT forward + backward": transformers(backward=True),
    "VAE encode": {"ours": partial(vae, decode=False), BASELINE: partial(vae_diffusers, decode=False)},
    "VAE decode": {"ours": partial(vae, decode=True), BASELINE: partial(vae_diffusers, decode=True)},
}
