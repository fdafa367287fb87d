"""LoRA adapters of an MMDiT under other names and in other QKV layouts, as pure functions on their tensors.

A module is known by its parts: rows of projections under our names in the split layout, v and MLP of single blocks
apart. Parts of one rank each become a fused module as blocks on a diagonal, ``W + B A`` with ``A`` stacked and zeros in
``B`` off the blocks, as ComfyUI and diffusers have them; parts that share their ``A`` stay as they are. Both are undone
exactly.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from opensora.diffusion.lora_files import LoraFile, without_prefixes
from opensora.models.mmdit.naming import DOUBLE_BLOCK, EMBEDDERS, SINGLE_BLOCK, permute_heads
from opensora.utils.errors import UserError, shorten

T = TypeVar("T")
BLOCKS_KEY = "lora_blocks"  # metadata: how fused modules were made of parts
Q_K = ("q_proj", "k_proj")
SWAPPED = "final_layer.adaLN_modulation.1"  # (scale, shift) in diffusers, (shift, scale) here
OTHERS = ("cond_in", "guidance_img_in.in_layer", "guidance_img_in.out_layer")  # modules that only we have
QKV = {f"{s}_attn.qkv": tuple(f"{s}_attn.{p}" for p in ("q_proj", "k_proj", "v_proj")) for s in ("img", "txt")}
LINEAR1 = ("q_proj", "k_proj", "v_proj", "proj_mlp")
JOINED = {**QKV, "linear1": LINEAR1, "v_mlp": LINEAR1[2:]}
BLOCK = re.compile(r"(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)[._](\d+)[._](.+)")
FAMILIES = {  # name of the blocks -> ours, and our part for each of their modules
    "double_blocks": ("double_blocks", {name: name for name in DOUBLE_BLOCK.values()}),
    "single_blocks": ("single_blocks", {name: name for name in SINGLE_BLOCK.values()}),
    "transformer_blocks": ("double_blocks", DOUBLE_BLOCK),
    "single_transformer_blocks": ("single_blocks", {**SINGLE_BLOCK, "attn.to_v": "v_proj"}),
}


@dataclass(frozen=True)
class Entry:
    """The adapter of one module.

    Attributes:
        parts: whose rows it has, in order, under our names.
        widths: rows of each part.
        down: [rank, in].
        up: [out, rank].
        alpha: what the product is multiplied by, times the rank.
        rows: more tensors with a value per row: ``up_bias``, ``magnitude``.
    """

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    down: Tensor
    up: Tensor
    alpha: float
    rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return len(self.down)

    @property
    def scale(self) -> Fraction:
        """What the product is multiplied by."""
        return Fraction(self.alpha) / self.rank


@dataclass(frozen=True)
class Block:
    """Columns of a fused module's ``up``: those of parts that share their ``down``."""

    parts: tuple[str, ...]
    rank: int
    alpha: float


Blocks = dict[str, list[Block]]  # of modules that were made of parts, by name in our layouts


def parts_of(name: str) -> tuple[tuple[str, ...], bool] | None:
    """Parts of a stored module, and whether its name is one of diffusers; None for another model's.

    Args:
        name: with any prefix, with dots or, as Kohya's trainers have it, underscores.
    """
    for bare in without_prefixes(name):
        found = BLOCK.fullmatch(bare)
        if found:
            family, number, inside = found.groups()
            ours, modules = FAMILIES[family]
            theirs = family.endswith("transformer_blocks")
            table = {name: (part,) for name, part in modules.items()} | ({} if theirs else _joined(ours))
            parts = _by_either_name(table, inside)
            if parts:
                return tuple(f"{ours}.{number}.{part}" for part in parts), theirs
            continue
        for theirs, modules in ((False, {n: n for n in (*EMBEDDERS.values(), *OTHERS)}), (True, EMBEDDERS)):
            part = _by_either_name(modules, bare)
            if part:
                return (part,), theirs
    return None


def _joined(blocks: str) -> dict[str, tuple[str, ...]]:
    return {name: parts for name, parts in JOINED.items() if (name in QKV) == (blocks == "double_blocks")}


def _by_either_name(table: Mapping[str, T], name: str) -> T | None:
    return table.get(name) or {key.replace(".", "_"): value for key, value in table.items()}.get(name)


def home(part: str, layout: str) -> tuple[str, tuple[str, ...]]:
    """The module that has a part, and all of that module's parts.

    Args:
        part: under our name.
        layout: ``fused``, ``split`` or ``diffusers``.

    Raises:
        UserError: diffusers has no such module.
    """
    found = BLOCK.fullmatch(part)
    if layout == "diffusers":
        return _diffusers_name(part), (part,)
    if found is None:
        return part, (part,)
    blocks, number, inside = found.groups()
    names = [name for name in _joined(blocks) if name in {"fused": (*QKV, "linear1"), "split": ("v_mlp",)}[layout]]
    name = next((name for name in names if inside in JOINED[name]), inside)
    prefix = f"{blocks}.{number}."
    return prefix + name, tuple(prefix + each for each in JOINED.get(name, (name,)))


def _diffusers_name(part: str) -> str:
    found = BLOCK.fullmatch(part)
    if found is None:
        names = [theirs for theirs, ours in EMBEDDERS.items() if ours == part]
    else:
        blocks, number, inside = found.groups()
        table, single = (DOUBLE_BLOCK, "") if blocks == "double_blocks" else (SINGLE_BLOCK, "single_")
        names = [f"{single}transformer_blocks.{number}.{theirs}" for theirs, ours in table.items() if ours == inside]
    if not names:
        raise UserError(f"diffusers' FluxTransformer2DModel has no module for {part}: take another format")
    return names[0]


def entries_of(file: LoraFile, partial: bool = False) -> tuple[list[Entry], bool]:
    """Modules of an adapter, and whether their names are those of diffusers.

    Args:
        file: the adapter.
        partial: leave out what is not of an MMDiT or not of LoRA, instead of refusing it.

    Raises:
        UserError: modules of another model, or tensors that are no low-rank change.
    """
    entries, theirs, odd = [], set(), list(file.others)
    for name, tensors in file.modules.items():
        found = parts_of(name)
        more = tensors.keys() - {"down", "up", "alpha", "up_bias", "magnitude"}
        if found is None or more or not {"down", "up"} <= tensors.keys() or _has_columns(tensors):
            odd.append(name)
            continue
        entries.append(_entry(file, name, found[0]))
        theirs.add(found[1])
    if odd and not partial:
        raise UserError(
            f"{file.path}: {len(odd)} modules are not low-rank changes of an MMDiT's: {shorten(sorted(odd))}; "
            "--partial leaves them out"
        )
    if not entries:
        raise UserError(f"{file.path}: no module of it is one of an MMDiT")
    if len(theirs) > 1:
        raise UserError(f"{file.path}: it mixes names of diffusers with others")
    _check_once(file, entries)
    return entries, theirs.pop()


def _has_columns(tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a DoRA with the lengths of columns, [1, in], which no other format has."""
    magnitude = tensors.get("magnitude")
    return magnitude is not None and magnitude.ndim == 2 and magnitude.shape == (1, tensors["down"].shape[1])


def _check_once(file: LoraFile, entries: Iterable[Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        twice = seen & set(entry.parts)
        if twice:
            raise UserError(f"{file.path}: two modules change {shorten(sorted(twice))}")
        seen |= set(entry.parts)


def _entry(file: LoraFile, name: str, parts: tuple[str, ...]) -> Entry:
    tensors = file.modules[name]
    down, up = tensors["down"], tensors["up"]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or not len(down):
        raise UserError(f"{file.path}: {name} has matrices of {[*down.shape]} and {[*up.shape]}: they do not fit")
    widths = part_widths(parts, len(up), down.shape[1])
    if min(widths) <= 0 or sum(widths) != len(up):
        raise UserError(f"{file.path}: {name} has {len(up)} rows, which are not those of {shorten(parts)}")
    rows = {str(role): tensors[role].flatten() for role in ("up_bias", "magnitude") if role in tensors}
    return Entry(parts, widths, down, up, file.alpha(name, len(down)), rows)


def part_widths(parts: Sequence[str], rows: int, hidden: int) -> tuple[int, ...]:
    """Rows of each part of a module with so many rows and ``hidden`` inputs."""
    if len(parts) == 1:
        return (rows,)
    if len(parts) == 3:
        return (rows // 3,) * 3
    return (*[hidden] * (len(parts) - 1), rows - hidden * (len(parts) - 1))


def reorder(entry: Entry, head_dim: int, half_split: bool) -> Entry:
    """An entry in the other rotary layout: rows of q and k move (see `permute_heads`).

    Raises:
        UserError: heads of ``head_dim`` channels do not fit.
    """

    def moved(values: Tensor) -> Tensor:
        pieces = values.split(entry.widths)
        return torch.cat([
            permute_heads(piece, head_dim, half_split) if part.endswith(Q_K) else piece
            for part, piece in zip(entry.parts, pieces)
        ])  # fmt: skip

    if not any(part.endswith(Q_K) for part in entry.parts):
        return entry
    odd = [w for part, w in zip(entry.parts, entry.widths) if part.endswith(Q_K) and w % head_dim]
    if odd:
        raise UserError(
            f"{entry.parts[0]} has {odd[0]} rows, which are no heads of {head_dim} channels: see --head-dim"
        )
    return replace(entry, up=moved(entry.up), rows={role: moved(value) for role, value in entry.rows.items()})


def swap_halves(entry: Entry) -> Entry:
    """The last modulation with shift and scale in the other order; other entries as they are."""
    if entry.parts != (SWAPPED,):
        return entry

    def swapped(values: Tensor) -> Tensor:
        return torch.cat(values.chunk(2)[::-1])

    return replace(entry, up=swapped(entry.up), rows={role: swapped(value) for role, value in entry.rows.items()})


def regroup(entries: Sequence[Entry], layout: str, blocks: Blocks) -> tuple[dict[str, Entry], Blocks]:
    """Entries by the modules of another layout.

    Args:
        entries: of one adapter.
        layout: see :func:`home`.
        blocks: how its fused modules were made, as far as that is known.

    Returns:
        entries by name, and how these are made of parts.

    Raises:
        UserError: alphas that no single one can stand for.
    """
    made: dict[str, list[Entry]] = {}
    wholes: dict[str, tuple[str, ...]] = {}
    known: Blocks = {}
    for entry in entries:
        name, parts = home(entry.parts[0], layout)
        if parts == entry.parts:
            made[name], wholes[name] = [entry], parts
            own = _own_name(parts)
            if own in blocks:
                known[own] = blocks[own]
            continue
        for part in cut(entry, blocks.get(_own_name(entry.parts), ())):
            name, parts = home(part.parts[0], layout)
            made.setdefault(name, []).append(part)
            wholes[name] = parts
    hidden = _mlp_rows(entries)
    result = {}
    for name, pieces in made.items():
        if pieces[0].parts == wholes[name]:
            result[name] = pieces[0]
            continue
        result[name], found = join(pieces, wholes[name], hidden)
        if found:
            known[_own_name(wholes[name])] = found
    return result, known


def _own_name(parts: tuple[str, ...]) -> str:
    return "+".join(parts)


def _mlp_rows(entries: Iterable[Entry]) -> int | None:
    """Channels of the MLP in single blocks, from any module that tells them."""
    for entry in entries:
        for part, width in zip(entry.parts, entry.widths):
            if part.endswith(".proj_mlp"):
                return width
            if part.endswith(".linear2"):
                return entry.down.shape[1] - width
    return None


def cut(entry: Entry, known: Sequence[Block] = ()) -> list[Entry]:
    """Parts of a fused entry, each with the columns of its block if the entry is made of blocks, else with all of them.

    Args:
        entry: of several parts or of one.
        known: the blocks that it was made of.
    """
    if len(entry.parts) == 1:
        return [entry]
    for blocks in (known, _chunks(entry)):
        parts = _by_blocks(entry, blocks)
        if parts:
            return parts
    shared = (Block(entry.parts, entry.rank, entry.alpha),)
    return _by_blocks(entry, shared) or []


def _chunks(entry: Entry) -> list[Block]:
    """A block per part, all of one rank; none if alpha cannot be divided exactly."""
    rank, rest = divmod(entry.rank, len(entry.parts))
    alpha = entry.scale * rank
    if rest or not _is_stored(alpha):
        return []
    return [Block((part,), rank, float(alpha)) for part in entry.parts]


def _by_blocks(entry: Entry, blocks: Sequence[Block]) -> list[Entry]:
    """Parts of an entry that is made of blocks, none if it is not."""
    if sum(block.rank for block in blocks) != entry.rank:
        return []
    ups = dict(zip(entry.parts, entry.up.split(entry.widths)))
    rows = {role: dict(zip(entry.parts, value.split(entry.widths))) for role, value in entry.rows.items()}
    parts, start, outside = {}, 0, entry.up.count_nonzero()
    for block in blocks:
        columns = slice(start, start := start + block.rank)
        factor = _ratio(Fraction(block.alpha) / block.rank, entry.scale)
        if not _is_power(factor):
            return []
        for part in block.parts:
            if part not in ups:
                return []
            up = ups[part][:, columns]
            outside -= up.count_nonzero()
            more = {role: value[part] for role, value in rows.items()}
            parts[part] = Entry((part,), (len(up),), entry.down[columns], up / float(factor), block.alpha, more)
    return [] if outside else [parts[part] for part in entry.parts if part in parts]


def join(pieces: Sequence[Entry], parts: tuple[str, ...], mlp_rows: int | None) -> tuple[Entry, list[Block]]:
    """Parts as one fused entry, and the blocks that it has; none if all parts share their ``down``.

    Args:
        pieces: entries of one part each; a part without an entry becomes rows of zeros.
        parts: of the result, in order.
        mlp_rows: channels of the MLP, None for four times the width.

    Raises:
        UserError: see :func:`regroup`.
    """
    by_part = {piece.parts[0]: piece for piece in pieces}
    ordered = [by_part[part] for part in parts if part in by_part]
    hidden = ordered[0].down.shape[1]
    fallback = {part: (mlp_rows or 4 * hidden) if part.endswith("proj_mlp") else hidden for part in parts}
    widths = tuple(len(by_part[part].up) if part in by_part else fallback[part] for part in parts)
    groups: list[list[Entry]] = [[ordered[0]]]
    for before, piece in pairwise(ordered):
        same = before.alpha == piece.alpha and torch.equal(before.down, piece.down)
        groups[-1].append(piece) if same else groups.append([piece])
    scale, rank = groups[0][0].scale, sum(group[0].rank for group in groups)
    alpha = scale * rank
    if not _is_stored(alpha):
        raise UserError(f"{parts[0]} and its neighbours: no alpha stands for {float(scale)} at rank {rank} exactly")
    up = ordered[0].up.new_zeros(sum(widths), rank)
    starts = {part: sum(widths[:number]) for number, part in enumerate(parts)}
    column = 0
    for group in groups:
        for piece in group:
            at = slice(starts[piece.parts[0]], starts[piece.parts[0]] + len(piece.up))
            up[at, column : column + piece.rank] = _scaled(piece, _ratio(piece.scale, scale))
        column += group[0].rank
    joined = Entry(
        parts, widths, torch.cat([group[0].down for group in groups]), up, float(alpha), _rows(by_part, parts)
    )
    blocks = [Block(tuple(p for each in group for p in each.parts), group[0].rank, group[0].alpha) for group in groups]
    return joined, blocks if len(groups) > 1 or len(ordered) < len(parts) else []


def _scaled(piece: Entry, factor: Fraction) -> Tensor:
    """``up`` times a power of 2, which changes no digit.

    Raises:
        UserError: another factor, or numbers too large or too small for it.
    """
    scaled = piece.up * float(factor)
    if not _is_power(factor) or not torch.equal(scaled / float(factor), piece.up):
        raise UserError(
            f"{piece.parts[0]}: its alpha / rank is {float(piece.scale):g}, which is {float(factor):g} times that of "
            "its neighbours; a fused module has one for all, so this adapter cannot be fused exactly"
        )
    return scaled


def _ratio(one: Fraction, other: Fraction) -> Fraction:
    """``one / other``, 1 of equal numbers, 0 where there is none."""
    return Fraction(1) if one == other else one / other if other else Fraction(0)


def _is_power(factor: Fraction) -> bool:
    """Whether it is a power of 2."""
    return factor > 0 and all(part & (part - 1) == 0 for part in (factor.numerator, factor.denominator))


def _rows(by_part: Mapping[str, Entry], parts: Sequence[str]) -> dict[str, Tensor]:
    """Values per row of a joined entry.

    Raises:
        UserError: some parts have them, others do not.
    """
    roles = {role for piece in by_part.values() for role in piece.rows}
    for role in roles:
        lacking = [part for part in parts if part not in by_part or role not in by_part[part].rows]
        if lacking:
            raise UserError(f"{shorten(lacking)}: no {role}, which its neighbours have: this cannot be fused")
    return {role: torch.cat([by_part[part].rows[role] for part in parts]) for role in roles}


def _is_stored(alpha: Fraction) -> bool:
    """Whether an alpha is one of float32, in which files keep it."""
    number = float(alpha)
    return math.isfinite(number) and Fraction(number) == alpha and float(torch.tensor(number)) == number


def blocks_text(blocks: Blocks) -> str:
    """Blocks as text for a file's metadata."""
    return json.dumps({name: [[b.parts, b.rank, b.alpha] for b in made] for name, made in sorted(blocks.items())})


def read_blocks(text: str | None) -> Blocks:
    """The inverse of :func:`blocks_text`; nothing of text that is not of its kind."""
    try:
        stored = json.loads(text or "{}")
        return {name: [Block(tuple(p), int(r), float(a)) for p, r, a in made] for name, made in stored.items()}
    except (AttributeError, TypeError, ValueError):
        return {}
