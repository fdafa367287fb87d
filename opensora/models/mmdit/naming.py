"""Modules of an MMDiT under other names: in the other QKV layout, and in diffusers' ``FluxTransformer2DModel``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from opensora.models.mmdit.config import MMDiTConfig

# fused projection -> its rows in order, as modules of the split layout (`v_mlp`: v, then the MLP's hidden channels)
PARTS = {"qkv": ("q_proj", "k_proj", "v_proj"), "linear1": ("q_proj", "k_proj", "v_mlp")}

# module of diffusers' FluxTransformer2DModel -> ours in the split layout
EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE_BLOCK = {
    "norm1.linear": "img_mod.lin",
    "attn.to_q": "img_attn.q_proj",
    "attn.to_k": "img_attn.k_proj",
    "attn.to_v": "img_attn.v_proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
    "attn.add_q_proj": "txt_attn.q_proj",
    "attn.add_k_proj": "txt_attn.k_proj",
    "attn.add_v_proj": "txt_attn.v_proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE_BLOCK = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "q_proj",
    "attn.to_k": "k_proj",
    "attn.to_v": "v_proj",  # joined with `proj_mlp` to `v_mlp`
    "proj_mlp": "proj_mlp",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
DIFFUSERS_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def permute_heads(rows: Tensor, head_dim: int, half_split: bool) -> Tensor:
    """Reorder the channels of every head along axis 0, ``[H*D, ...]``, by rotary pairs.

    Args:
        rows: weight rows, biases or scales of queries or keys.
        head_dim: channels D of one head.
        half_split: true from pairs (2k, 2k + 1) to (k, k + D/2); false the other way.
    """
    pairs = (head_dim // 2, 2) if half_split else (2, head_dim // 2)
    return rows.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Piece:
    """Rows of a module under another name, as rows of a module of a model.

    Attributes:
        module: of the model.
        rows: those of the other module; None: all.
        at: where they begin in the model's.
        rotary: they are queries or keys.
        reorder: their rotary channels are interleaved, the model's are half-split.
    """

    module: str
    rows: slice | None = None
    at: int = 0
    rotary: bool = False
    reorder: bool = False


def other_names(config: MMDiTConfig) -> dict[str, list[Piece]]:
    """Where the rows of projections of the other QKV layout, and of all modules of diffusers, are in a model.

    Its own names are not among them.
    """
    found: dict[str, list[Piece]] = {}
    for i in range(config.depth):
        for stream in ("img", "txt"):
            found |= _projections(config, f"double_blocks.{i}.{stream}_attn.", single=False)
    for i in range(config.depth_single_blocks):
        found |= _projections(config, f"single_blocks.{i}.", single=True)
    own = {piece.module for pieces in found.values() for piece in pieces}
    theirs = {name: _interleaved(config, found.get(ours, [Piece(ours)])) for name, ours in _diffusers(config)}
    width, shift_scale = config.hidden_size, "final_layer.adaLN_modulation.1"
    # (scale, shift) there, (shift, scale) here
    theirs["norm_out.linear"] = [
        Piece(shift_scale, slice(width), width),
        Piece(shift_scale, slice(width, 2 * width), 0),
    ]
    return {name: pieces for name, pieces in found.items() if name not in own} | theirs


def _projections(config: MMDiTConfig, prefix: str, single: bool) -> dict[str, list[Piece]]:
    """Input projections of an attention in both layouts, and ``v_proj`` and ``proj_mlp`` of single blocks alone."""
    widths = {"q": config.hidden_size, "k": config.hidden_size, "v": config.hidden_size}
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
    groups = {name: [part] for name, part in names.items()} | {"qkv": ["q", "k", "v"]}
    own = [["q", "k", "v"]] if config.fused_qkv else [["q"], ["k"], ["v"]]
    if single:
        widths["mlp"] = config.mlp_hidden
        del groups["qkv"]
        groups |= {"linear1": [*widths], "v_mlp": ["v", "mlp"], "proj_mlp": ["mlp"]}
        own = [[*widths]] if config.fused_qkv else [["q"], ["k"], ["v", "mlp"]]
    homes = {}
    for parts in own:
        module = next(name for name, group in groups.items() if group == parts)
        for number, part in enumerate(parts):
            homes[part] = (prefix + module, sum(widths[before] for before in parts[:number]))
    return {prefix + name: list(_pieces(parts, widths, homes)) for name, parts in groups.items()}


def _pieces(parts: list[str], widths: dict[str, int], homes: dict[str, tuple[str, int]]) -> Iterator[Piece]:
    start = 0
    for part in parts:
        module, at = homes[part]
        yield Piece(module, slice(start, start + widths[part]), at, rotary=part in ("q", "k"))
        start += widths[part]


def _interleaved(config: MMDiTConfig, pieces: list[Piece]) -> list[Piece]:
    return [replace(piece, reorder=piece.rotary and config.use_liger_rope) for piece in pieces]


def _diffusers(config: MMDiTConfig) -> Iterator[tuple[str, str]]:
    """Modules of diffusers, each with ours in the split layout."""
    yield from EMBEDDERS.items()
    for i in range(config.depth):
        yield from ((f"transformer_blocks.{i}.{name}", f"double_blocks.{i}.{o}") for name, o in DOUBLE_BLOCK.items())
    for i in range(config.depth_single_blocks):
        yield from (
            (f"single_transformer_blocks.{i}.{name}", f"single_blocks.{i}.{o}") for name, o in SINGLE_BLOCK.items()
        )
