"""What the converting programs share: reading the weights to convert, writing the converted ones."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from opensora.acceleration.devices import torch_dtype
from opensora.models.mmdit.loading import layout_metadata
from opensora.models.quantization.kinds import METADATA
from opensora.utils.errors import UserError
from opensora.utils.new_files import check_place
from opensora.utils.weights import WeightFiles, check_finite
from opensora.utils.weights_writing import save_safetensors
from tools.convert.layouts import State, model_config

HALF_SPLIT = {"interleaved": False, "half-split": True}  # --rope -> use_liger_rope
FUSED = {"split": False, "fused": True}  # --qkv -> fused_qkv
FROM_WRITER = ("format", "total_size")  # metadata about a file and its shards, not about the weights


def add_output(parser: argparse.ArgumentParser) -> None:
    """Arguments of every converting program about the file it writes."""
    parser.add_argument("output", type=Path, help="safetensors file to write; must not exist")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as in the source)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output that exists, has another suffix or cannot be written, before any work.

    Raises:
        UserError: says which, and what to give instead; also for an unknown ``--dtype``.
    """
    if args.output.suffix != ".safetensors":
        raise UserError(f"output {args.output}: name a file that ends in .safetensors")
    if args.output.is_dir():
        raise UserError(f"output {args.output} is a folder; name a file")
    check_place(args.output, "output")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; choose another name or give --overwrite")
    if args.dtype is not None:
        torch_dtype(args.dtype)


def read(weights: WeightFiles, dtype: str | None) -> State:
    """All tensors of the source, floating-point ones in ``dtype`` (None keeps the file's). Raises as `check_plain` and
    `finite_tensors`."""
    check_plain(weights)
    return dict(finite_tensors(weights, torch_dtype(dtype) if dtype else None))


def finite_tensors(
    weights: WeightFiles, dtype: torch.dtype | None = None, skip: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the source, see :meth:`WeightFiles.tensors`.

    Raises:
        UserError: one is not finite, as it is or in ``dtype``: what is made of it would be damaged too.
    """
    for key, value in weights.tensors(dtype=dtype, skip=skip):
        check_finite(key, value, weights.path)
        yield key, value


def check_plain(weights: WeightFiles) -> None:
    """Refuse weights that cannot be taken apart.

    Raises:
        UserError: they are quantised.
    """
    kind = weights.metadata.get(METADATA)
    if kind is not None:
        raise UserError(f"{weights.path}: its weights are quantised, to {kind}; take those that they were made from")


def recorded(weights: WeightFiles) -> dict[str, str]:
    """Metadata of the source that stays true of converted weights."""
    return {key: value for key, value in weights.metadata.items() if key not in FROM_WRITER}


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Begin the messages of errors about a state dict with the file it came from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def write_mmdit(state: State, use_liger_rope: bool | None, args: argparse.Namespace, metadata: dict[str, str]) -> str:
    """Check the converted weights against the model, and write them with their layouts recorded.

    Args:
        state: weights in the layout to write.
        use_liger_rope: rotary layout (half-split if true); None if it is not known, and then not recorded.
        args: arguments of `add_output` and ``source``.
        metadata: what else to record.

    Returns:
        the layouts, in the words of a config.
    """
    with naming(args.source):
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        layouts = layout_metadata(model_config(shapes, bool(use_liger_rope)))
    if use_liger_rope is None:
        del layouts["use_liger_rope"]
    save_safetensors(state, args.output, {**metadata, **layouts})
    return ", ".join(f"model.{key}={value}" for key, value in layouts.items())
