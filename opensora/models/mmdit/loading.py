"""What a weight file says about its model, and which config key to change when they disagree."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from opensora.models.kinds import explain_other_kind
from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.quantization.loading import Quantization

EMBEDDERS: Mapping[str, str] = MappingProxyType(  # key of the config -> module
    {"guidance_embed": "guidance_in", "guidance_img_embed": "guidance_img_in", "cond_embed": "cond_in"}
)
Shapes = Mapping[str, tuple[int, ...]]

# linear layers of the blocks without their modulation, the only ones whose weights are quantised
QUANTIZED = re.compile(r"(double|single)_blocks\.\d+\.(?!(img_mod|txt_mod|modulation)\.)")


def covers(name: str) -> bool:
    """Whether the linear layer of this name may have quantised weights."""
    return QUANTIZED.match(name) is not None


def quantization(wanted: str | None = None, section: str = "model") -> Quantization:
    """How the linear layers of an MMDiT are quantised: embedders, modulation and the last layer are not."""
    return Quantization(covers, wanted, section)


def layout_metadata(config: MMDiTConfig) -> dict[str, str]:
    """Layouts to record in the metadata of a written file: shapes alone do not tell the rotary layout."""
    return {"fused_qkv": str(config.fused_qkv), "use_liger_rope": str(config.use_liger_rope)}


def config_of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Config fields that the keys and shapes of an MMDiT state dict determine (those it has the keys for)."""
    found: dict[str, Any] = {}
    shapes = {
        re.sub(r"\.qweight$", ".weight", key): shape for key, shape in shapes.items()
    }  # rows of quantised weights

    def count(prefix: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(prefix)})

    def size(key: str, axis: int) -> int | None:
        shape = shapes.get(key, ())
        return shape[axis] if len(shape) > axis else None

    found["hidden_size"] = size("img_in.weight", 0)
    found["in_channels"] = size("img_in.weight", 1)
    found["vec_in_dim"] = size("vector_in.in_layer.weight", 1)
    found["context_in_dim"] = size("txt_in.weight", 1)
    found["depth"], found["depth_single_blocks"] = count("double_blocks."), count("single_blocks.")
    found["guidance_embed"] = "guidance_in.in_layer.weight" in shapes
    found["guidance_img_embed"] = "guidance_img_in.in_layer.weight" in shapes
    found["cond_embed"] = "cond_in.weight" in shapes
    fused = {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"}
    split = {"double_blocks.0.img_attn.q_proj.weight", "single_blocks.0.q_proj.weight"}
    if (fused | split) & shapes.keys():
        found["fused_qkv"] = bool(fused & shapes.keys())
    if found["depth"]:
        biases = {"double_blocks.0.img_attn.qkv.bias", "double_blocks.0.img_attn.q_proj.bias"}
        found["qkv_bias"] = bool(biases & shapes.keys())
    hidden = found["hidden_size"] or 0
    heads = size("double_blocks.0.img_attn.norm.query_norm.scale", 0) or size(
        "single_blocks.0.norm.query_norm.scale", 0
    )
    if hidden and heads:
        found["num_heads"] = hidden // heads
    mlp_hidden = size("double_blocks.0.img_mlp.0.weight", 0)
    if hidden and mlp_hidden is not None:
        found["mlp_ratio"] = mlp_hidden / hidden
    cond = size("cond_in.weight", 1)
    if cond is not None and found["in_channels"]:
        found["patch_size"] = math.isqrt(max(cond - found["in_channels"], 0))
    return {key: value for key, value in found.items() if value is not None}


def explain_mismatch(config: MMDiTConfig, file_shapes: Shapes, strict: bool = True) -> list[str]:
    """Sentences that say how the model of a file differs from the configured one, and which key to set.

    Args:
        config: the configured model.
        file_shapes: shape of every tensor in the file.
        strict: false where embedders of conditions and guidance may differ.

    Returns:
        no sentence if the file's keys and shapes reveal no difference.
    """
    if any(key.startswith("transformer_blocks.") for key in file_shapes):
        return [
            "The file is a Flux transformer in the layout of diffusers: convert it first with "
            "python tools/convert/from_diffusers.py SOURCE OUT.safetensors."
        ]
    other = explain_other_kind("flux", file_shapes)
    if other:
        return other
    found = config_of_shapes(file_shapes)
    hints = _explain_embedders(config, found) if strict else []
    for key, value in found.items():
        wanted = getattr(config, key)
        if value == wanted or key in EMBEDDERS:
            continue
        if key == "mlp_ratio" and int(wanted * found["hidden_size"]) == value * found["hidden_size"]:
            continue  # the ratio is rounded to whole channels
        if key == "fused_qkv":
            kind = "fused QKV projections (qkv, linear1)" if value else "split QKV projections (q_proj, k_proj, v_proj)"
            hints.append(f"The file has {kind}: set model.fused_qkv={value}.")
        else:
            hints.append(f"The file was made with {key}={value}, the config says {wanted}: set model.{key}={value}.")
    return hints


def _explain_embedders(config: MMDiTConfig, found: Mapping[str, Any]) -> list[str]:
    """Sentences about guidance_in and cond_in, which tell apart the kinds of released models."""
    differs = {key for key in EMBEDDERS if found[key] != getattr(config, key)}
    if differs and found["guidance_embed"] and not found["cond_embed"]:
        return [
            "The file is an image-only Flux model (it has guidance_in and no cond_in). To sample images set "
            "model.guidance_embed=True and model.cond_embed=False; to start training a video model from it set "
            "model.strict_load=False."
        ]
    if "cond_embed" in differs and config.cond_embed:
        differs.discard("cond_embed")
        cond = [
            "The file has no cond_in, so its model takes no image condition: set model.cond_embed=False, or "
            "model.strict_load=False to start training with a condition embedder at zero."
        ]
    else:
        cond = []
    return cond + [
        f"The file has {'' if found[key] else 'no '}{EMBEDDERS[key]}: set model.{key}={found[key]}."
        for key in sorted(differs)
    ]
