"""The plan of a run in numbers, for ``--dry-run``: sizes, forwards, parameters, memory, FLOPs, files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.diffusion import building
from opensora.diffusion.denoise import MAX_TOKENS_AT_ONCE
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.validate import check_config


def forward_flops(model: Any, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one forward of the MMDiT on one sample (2 per multiply-add).

    Counts the matrix products of tokens (each stream passes through its half of a double block) and attention.
    """
    config = model.config

    def weights(blocks: Any) -> int:
        # modulation works on one vector per sample, not on tokens
        return sum(
            p.numel() for name, p in blocks.named_parameters() if p.ndim == 2 and "mod" not in name.split(".")[1]
        )

    tokens = image_tokens + text_tokens
    linear = weights(model.double_blocks) / 2 + weights(model.single_blocks)
    attention = 2 * tokens * config.hidden_size * (config.depth + config.depth_single_blocks)
    return 2.0 * tokens * (linear + attention)


def activation_bytes(model: Any, tokens: int, rows: int, dtype: torch.dtype) -> float:
    """Rough peak of one block's activations: input, q, k, v, attention output, and the MLP's hidden layer twice."""
    config = model.config
    return rows * tokens * config.hidden_size * (6 + 2 * config.mlp_ratio) * dtype.itemsize


def dry_run_report(cfg: Mapping[str, Any], device: torch.device, stems: Sequence[Path]) -> str:
    """What a run would do, as text for the user. No weights are loaded."""
    plan: SamplePlan = check_config(cfg)
    dtype = building.torch_dtype(cfg["dtype"])
    model: Any = building.build_on_meta(cfg["model"])
    names = ["model", "ae"] + (["img_flux", "img_flux_ae"] if cfg["use_t2i2v"] else [])
    counts = {name: building.count_parameters(building.build_on_meta(cfg[name])) for name in names}
    text_tokens = cfg["t5"]["max_length"]
    flops = forward_flops(model, plan.tokens, text_tokens) * plan.forwards
    tokens = plan.tokens + text_tokens
    batch = cfg["batch_size"]
    branches = 3 if plan.has_image else 2
    rows = batch * (branches if batch * branches * plan.tokens <= MAX_TOKENS_AT_ONCE else 1)
    weights = (max if cfg["offload"] else sum)(count * dtype.itemsize for count in counts.values())
    ending = ".png" if plan.num_frames == 1 else ".mp4"
    lines = [
        f"video        {plan.num_frames} frames of {plan.height} x {plan.width} (height x width), {plan.cond_type}",
        f"latent       {' x '.join(map(str, plan.latent_size))} (frames x rows x columns)",
        f"tokens       {plan.tokens} image + {text_tokens} text",
        f"steps        {plan.num_steps}, {plan.forwards} forwards per sample, batches of {batch}",
        f"device       {device}, {cfg['dtype']}, offload {'on' if cfg['offload'] else 'off'}",
        *(f"parameters   {count / 1e6:,.1f}M {name}" for name, count in counts.items()),
        f"memory       about {_size(weights)} of weights on the device (text encoders not counted), and "
        f"{_size(activation_bytes(model, tokens, rows, dtype))} of activations while sampling",
        f"compute      about {flops / 1e12:,.3g} TFLOP per sample",
        f"files        {len(stems)} to write, with .txt and .json beside:",
        *(f"  {stem}{ending}" for stem in stems),
        "dry run: nothing loaded, nothing written",
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
