"""Layouts of MMDiT weights, as pure functions on state dicts: fused or split QKV, rotary order, diffusers' names.

C hidden size, D head dimension. The layouts hold the same numbers: every change is a reordering and is undone exactly
by its inverse. Rows of q and k that move in the rotary order take the scales of their norms along; v never moves.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.loading import Shapes, config_of_shapes
from opensora.models.mmdit.naming import (
    DIFFUSERS_BLOCK,
    DOUBLE_BLOCK,
    EMBEDDERS,
    PARTS,
    SINGLE_BLOCK,
    permute_heads,
)
from opensora.utils.errors import UserError, shorten

State = dict[str, Tensor]


def _split_key(key: str) -> tuple[str, str, str]:
    """``double_blocks.0.img_attn.qkv.weight`` -> (``double_blocks.0.img_attn.``, ``qkv``, ``weight``)."""
    path, _, kind = key.rpartition(".")
    prefix, dot, name = path.rpartition(".")
    return prefix + dot, name, kind


def has_fused_qkv(keys: Iterable[str]) -> bool:
    """Whether an MMDiT's keys are those of fused projections.

    Raises:
        UserError: the keys are those of another model, or of both layouts.
    """
    keys = set(keys)
    if any(DIFFUSERS_BLOCK.match(key) for key in keys):
        raise UserError("it is a Flux transformer in the layout of diffusers: use tools/convert/from_diffusers.py")
    names = {_split_key(key)[1] for key in keys if key.startswith(("double_blocks.", "single_blocks."))}
    fused, split = bool(names & {"qkv", "linear1"}), "q_proj" in names
    if "img_in.weight" not in keys or not (fused or split):
        raise UserError("it is not an MMDiT: it lacks img_in, or blocks with query, key and value projections")
    if fused and split:
        raise UserError("it has both fused projections (qkv, linear1) and split ones (q_proj): it mixes two models")
    return fused


def split_qkv(state: Mapping[str, Tensor]) -> State:
    """Fused projections -> split ones: rows q, k, rest of ``qkv`` and ``linear1`` become three modules."""
    hidden = state["img_in.weight"].shape[0]
    converted: State = {}
    for key, value in state.items():
        prefix, name, kind = _split_key(key)
        if name not in PARTS:
            converted[key] = value
            continue
        rows = value.split([hidden, hidden, len(value) - 2 * hidden])
        converted.update((f"{prefix}{part}.{kind}", part_rows) for part, part_rows in zip(PARTS[name], rows))
    return converted


def fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """Split projections -> fused ones, the inverse of `split_qkv`.

    Raises:
        UserError: one of the three parts is missing.
    """
    converted: State = {}
    parts = {part for names in PARTS.values() for part in names}
    for key, value in state.items():
        prefix, name, kind = _split_key(key)
        if name not in parts:
            converted[key] = value
        elif name == "q_proj":
            fused = "qkv" if prefix.endswith("attn.") else "linear1"
            names = [f"{prefix}{part}.{kind}" for part in PARTS[fused]]
            missing = [part for part in names if part not in state]
            if missing:
                raise UserError(f"it has {key} but not {', '.join(missing)}")
            converted[f"{prefix}{fused}.{kind}"] = torch.cat([state[part] for part in names])
    return converted


def change_rope(state: Mapping[str, Tensor], half_split: bool) -> State:
    """Interleaved -> half-split rotary layout (``half_split``) or back, in either QKV layout.

    The rotation of pair k is the same in both layouts, so attention scores are, too. Norms commute with the
    reordering as long as their scales follow it.
    """
    hidden = state["img_in.weight"].shape[0]
    head_dim = next(len(value) for key, value in state.items() if key.endswith("query_norm.scale"))

    def permute(rows: Tensor) -> Tensor:
        return permute_heads(rows, head_dim, half_split)

    converted: State = {}
    for key, value in state.items():
        _, name, _ = _split_key(key)
        if name in PARTS:
            q, k, rest = value.split([hidden, hidden, len(value) - 2 * hidden])
            value = torch.cat((permute(q), permute(k), rest))
        elif name in ("q_proj", "k_proj", "query_norm", "key_norm"):
            value = permute(value)
        converted[key] = value
    return converted


def from_diffusers(state: Mapping[str, Tensor]) -> State:
    """State dict of diffusers' ``FluxTransformer2DModel`` -> ours, with split QKV and interleaved rotary layout.

    Raises:
        UserError: keys of another model, or of an adapter; names them.
    """
    if not any(DIFFUSERS_BLOCK.match(key) for key in state):
        ours = " (it is one in our names already: use tools/convert/mmdit.py)" if "img_in.weight" in state else ""
        raise UserError(f"it is not a Flux transformer in the layout of diffusers{ours}")
    if "x_embedder.weight" not in state:
        raise UserError("it lacks x_embedder.weight: it is only a part of a Flux transformer, or an adapter for one")
    renamed: State = {}
    unknown = []
    for key, value in state.items():
        name = _our_key(key)
        if name is None:
            unknown.append(key)
            continue
        # (scale, shift) there, (shift, scale) here
        renamed[name] = torch.cat(value.chunk(2)[::-1]) if "adaLN_modulation" in name else value
    if unknown:
        raise UserError(f"it has tensors that FluxTransformer2DModel does not have: {shorten(unknown)}")
    converted: State = {}
    for key, value in renamed.items():
        prefix, name, kind = _split_key(key)
        if name == "proj_mlp":
            v = renamed.get(f"{prefix}v_proj.{kind}")
            if v is None:
                raise UserError(
                    f"it has proj_mlp but not attn.to_v in {prefix.replace('blocks', 'transformer_blocks')}"
                )
            converted[f"{prefix}v_mlp.{kind}"] = torch.cat((v, value))
        elif not (name == "v_proj" and prefix.startswith("single_blocks.")):
            converted[key] = value
    return converted


def to_diffusers(state: Mapping[str, Tensor]) -> State:
    """The inverse of `from_diffusers`: from split QKV and the interleaved rotary layout.

    Raises:
        UserError: modules that diffusers' Flux does not have, such as the embedder of image conditions.
    """
    hidden = state["img_in.weight"].shape[0]
    converted: State = {}
    unknown = []
    for key, value in state.items():
        prefix, name, kind = _split_key(key)
        parts = {key: value}
        if name == "v_mlp":
            v, mlp = value.split([hidden, len(value) - hidden])
            parts = {f"{prefix}v_proj.{kind}": v, f"{prefix}proj_mlp.{kind}": mlp}
        elif "adaLN_modulation" in key:
            parts = {key: torch.cat(value.chunk(2)[::-1])}
        for ours, rows in parts.items():
            theirs = _their_key(ours)
            if theirs is None:
                unknown.append(ours)
            else:
                converted[theirs] = rows
    if unknown:
        raise UserError(
            f"it has {shorten(unknown)}, which diffusers' FluxTransformer2DModel does not have: only the image model "
            "fits in it"
        )
    return converted


def _their_key(key: str) -> str | None:
    """The inverse of `_our_key`."""
    module, _, kind = key.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if found is None:
        table, prefix, inside = EMBEDDERS, "", module
    else:
        blocks, number, inside = found.groups()
        table = DOUBLE_BLOCK if blocks == "double" else SINGLE_BLOCK
        prefix = f"{'single_' if blocks == 'single' else ''}transformer_blocks.{number}."
    name = next((theirs for theirs, ours in table.items() if ours == inside), None)
    return None if name is None else f"{prefix}{name}.{kind}"


def _our_key(key: str) -> str | None:
    """Our key in the split layout (single blocks still with ``v_proj`` and ``proj_mlp``), None for an unknown one."""
    module, _, kind = key.rpartition(".")
    block = DIFFUSERS_BLOCK.fullmatch(module)
    if block is None:
        prefix, name = "", EMBEDDERS.get(module)
    else:
        single, number, inside = block.groups()
        prefix = f"{'single' if single else 'double'}_blocks.{number}."
        name = (SINGLE_BLOCK if single else DOUBLE_BLOCK).get(inside)
    if name is None or kind not in ("weight", "bias"):
        return None
    return f"{prefix}{name}.{'scale' if name.endswith(('query_norm', 'key_norm')) else kind}"


def convert_layout(
    state: Mapping[str, Tensor], *, fused_qkv: bool | None = None, change_to_half_split: bool | None = None
) -> State:
    """Change the QKV layout, the rotary layout, or both; None leaves one as it is.

    Args:
        state: whole weights of an MMDiT (see `model_config`) in one of the four layouts.
        fused_qkv: the QKV layout of the result.
        change_to_half_split: true reorders interleaved channels to half-split, false half-split ones to interleaved;
            the caller knows which the file has, the tensors do not tell.

    Raises:
        UserError: not an MMDiT.
    """
    converted = dict(state)
    current = has_fused_qkv(converted)
    if change_to_half_split is not None:
        converted = change_rope(converted, change_to_half_split)
    if fused_qkv is not None and fused_qkv != current:
        reorder: Callable[[Mapping[str, Tensor]], State] = fuse_qkv if fused_qkv else split_qkv
        converted = reorder(converted)
    return converted


def model_config(shapes: Shapes, use_liger_rope: bool = False) -> MMDiTConfig:
    """Config of the model whose weights have these names and shapes, checked tensor by tensor.

    Rotary axes and base are not in the weights: they are filled with placeholders and matter to no shape.

    Raises:
        UserError: a tensor is missing, too many, or has the wrong shape.
    """
    found = {"qkv_bias": True, "patch_size": 2, **config_of_shapes(shapes)}
    absent = [
        key for key in ("hidden_size", "vec_in_dim", "context_in_dim", "num_heads", "mlp_ratio") if key not in found
    ]
    if absent == ["mlp_ratio"] and not found["depth"] and "single_blocks.0.linear2.weight" in shapes:
        found["mlp_ratio"] = shapes["single_blocks.0.linear2.weight"][1] / found["hidden_size"] - 1
    elif absent:
        raise UserError(f"it lacks the tensors that tell {', '.join(absent)}: it is not a whole MMDiT")
    # the config rounds down to whole channels
    found["mlp_ratio"] += 0.5 / found["hidden_size"]
    axes = [found["hidden_size"] // found["num_heads"], 0, 0]
    config = MMDiTConfig(**found, axes_dim=axes, theta=10000, use_liger_rope=use_liger_rope)
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in MMDiTModel(config).state_dict().items()}
    wrong = [f"no {key}" for key in wanted if key not in shapes]
    wrong += [f"{key}, which the model does not have" for key in shapes if key not in wanted]
    wrong += [
        f"{key} of shape {[*shapes[key]]} instead of {[*shape]}"
        for key, shape in wanted.items()
        if shapes.get(key, shape) != shape
    ]
    if wrong:
        more = f", ... ({len(wrong)} in all)" if len(wrong) > 5 else ""
        raise UserError(f"it is not a whole MMDiT: it has {', '.join(wrong[:5])}{more}")
    return config
