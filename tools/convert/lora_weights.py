"""LoRA adapters and whole weights: merged into them, extracted from a difference of two."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from opensora.acceleration.devices import torch_dtype
from opensora.diffusion.lora import read_loras, split_lora, tell_loras, with_loras
from opensora.diffusion.lora_files import read_lora
from opensora.models.mmdit import MMDiTModel
from opensora.utils.errors import UserError, shorten
from opensora.utils.weights import WeightFiles, open_weights
from opensora.utils.weights_writing import save_safetensors
from tools.convert.files import HALF_SPLIT, check_plain, finite_tensors, naming, read, recorded
from tools.convert.layouts import State, has_fused_qkv, model_config
from tools.convert.lora_layouts import Entry, part_widths, parts_of

EXACT_BELOW = 512  # sides of matrices that are decomposed wholly
OVERSAMPLE, ITERATIONS = 16, 6  # of the randomised decomposition (arXiv:0909.4061) of larger ones


def merge(path: Path, adapters: list[str], args: argparse.Namespace) -> None:
    """Write weights with adapters in them: what sampling with them computes with.

    Raises:
        UserError: weights or adapters that do not fit, or a rotary layout that matters and is not known.
    """
    weights = open_weights(path)
    check_plain(weights)
    with naming(path):
        has_fused_qkv(weights.shapes)
        config = model_config(weights.shapes, _half_split(weights, adapters, args.from_rope))
    with torch.device("meta"):
        model = MMDiTModel(config)
    read_adapters = read_loras(adapters, model, args.partial)
    change = with_loras(read_adapters)
    dtype = torch_dtype(args.dtype) if args.dtype else None
    state: State = {}
    for key, value in finite_tensors(weights):  # added in fp32 to the weights as they are, rounded once
        state[key] = change(key, value.float() if dtype is torch.float32 else value).to(dtype or value.dtype)
    tell_loras(read_adapters)
    save_safetensors(state, args.output, recorded(weights))
    changed = {name for adapter in read_adapters for name in adapter.modules}
    print(f"{args.output}: {len(state)} tensors, {len(changed)} modules changed by {', '.join(adapters)}")


def _half_split(weights: WeightFiles, adapters: list[str], from_rope: str | None) -> bool:
    """The rotary layout of weights; any if no adapter has names of diffusers, which alone are of a known layout."""
    text = weights.metadata.get("use_liger_rope")
    if text in ("True", "False"):
        if from_rope is not None and str(HALF_SPLIT[from_rope]) != text:
            raise UserError(f"{weights.path} records use_liger_rope={text}, so --from-rope {from_rope} is wrong")
        return text == "True"
    if from_rope is not None:
        return HALF_SPLIT[from_rope]
    for entry in adapters:
        found = [parts_of(name) for name in read_lora(split_lora(entry)[0]).modules]
        if any(theirs for _, theirs in filter(None, found)):
            raise UserError(
                f"{weights.path} does not record its rotary layout, and {entry} has the names of diffusers: give "
                "--from-rope (flux1-dev is interleaved; Open_Sora_v2 and flux1-dev-fused-rope are half-split)"
            )
    return False


@dataclass
class Extracted:
    """An adapter that stands for a difference, and how much of it: shares are of squared Frobenius norms."""

    entries: list[Entry] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    whole: float = 0.0  # squared norm of all differences
    kept: float = 0.0
    least: tuple[float, str] = (1.0, "")  # smallest share of a module
    others: list[str] = field(default_factory=list)  # changed tensors that an adapter cannot hold


def extract(before: Path, after: Path, args: argparse.Namespace) -> Extracted:
    """The best approximation of a difference of weights at a rank, module by module.

    Raises:
        UserError: weights of two models, or that are equal.
    """
    one, other = open_weights(before), open_weights(after)
    for weights in (one, other):
        check_plain(weights)
        with naming(weights.path):
            has_fused_qkv(weights.shapes)
    odd = sorted({key for key in {*one.shapes, *other.shapes} if one.shapes.get(key) != other.shapes.get(key)})
    if odd:
        raise UserError(f"{before} and {after} differ in names or shapes: {shorten(odd)}; see tools/convert/mmdit.py")
    layouts = {weights.metadata.get("use_liger_rope") for weights in (one, other)} - {None}
    if len(layouts) > 1:
        raise UserError(f"{before} and {after} record two rotary layouts; see tools/convert/mmdit.py")
    found = Extracted(metadata={"use_liger_rope": str(layouts.pop())} if layouts else {})
    base = read(one, None)
    for key, value in finite_tensors(other):
        difference = value.float() - base.pop(key).float()
        if bool(difference.count_nonzero()):
            _add(found, key, difference, torch_dtype(args.dtype) if args.dtype else value.dtype, args)
    if not found.entries:
        raise UserError(f"{before} and {after} have the same matrices: there is nothing to extract")
    _tell(found)
    return found


def _add(found: Extracted, key: str, difference: Tensor, dtype: torch.dtype, args: argparse.Namespace) -> None:
    name, _, kind = key.rpartition(".")
    parts = parts_of(name)
    energy = difference.double().square().sum().item()
    found.whole += energy
    if parts is None or kind != "weight" or difference.ndim != 2:
        found.others.append(key)
        return
    up, down = (factor.to("cpu", dtype) for factor in low_rank(difference.to(args.device), args.rank))
    left = (difference - up.float() @ down.float()).double().square().sum().item()
    found.kept += energy - left
    found.least = min(found.least, (1 - left / energy, name))
    widths = part_widths(parts[0], len(up), difference.shape[1])
    found.entries.append(Entry(parts[0], widths, down, up, float(len(down))))


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[out, rank]`` and ``[rank, in]`` whose product is nearest to a matrix; a smaller rank if it has no more."""
    if min(matrix.shape) <= max(EXACT_BELOW, 2 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(matrix, rank + OVERSAMPLE, ITERATIONS)
        v = right.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _tell(found: Extracted) -> None:
    share, name = found.least
    print(
        f"{len(found.entries)} modules differ; {found.kept / found.whole:.2%} of the squared difference is kept, "
        f"least in {name} ({share:.2%})"
    )
    if found.others:
        print(f"  not kept, as no matrices of modules: {len(found.others)} tensors ({shorten(sorted(found.others))})")
