"""A causal video autoencoder with a wider decoder that decodes as before, to be trained on with the encoder frozen.

``python tools/convert/widen_decoder.py VAE OUT.safetensors --channels 16 32 64 96 --norm-groups 4``
"""

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D
from opensora.models.hunyuan_vae.config import HunyuanVAEConfig
from opensora.utils.errors import UserError
from opensora.utils.weights import open_weights
from opensora.utils.weights_writing import save_safetensors
from tools.convert.autoencoders import video_config
from tools.convert.files import add_output, check_output, naming, read, recorded
from tools.convert.layouts import State

SPREAD = 0.5  # of what copies of a channel count for more or less, in standard deviations of the weights


def copied(old: int, new: int, groups: int) -> Tensor:
    """Which of ``old`` channels each of ``new`` ones is a copy of, ``[new]``; copies stay in their group of GroupNorm.

    Sizes that are equal, or no multiples of ``groups`` (pixels, latents), are left as they are.
    """
    if old == new:
        return torch.arange(old)
    within = torch.arange(new // groups) % (old // groups)
    return (torch.arange(groups)[:, None] * (old // groups) + within).flatten()


def widen(weight: Tensor, shape: torch.Size, groups: int, generator: torch.Generator) -> Tensor:
    """A weight or bias whose outputs are copies and whose inputs share what one gave before.

    Copies count unequally, by a random share that adds up to nothing, or they would stay copies in training.

    Args:
        weight: ``[C, ...]`` of a norm or bias, or ``[C_out, C_in, ...]``.
        shape: of the result.
        groups: of the GroupNorms.
        generator: draws the shares.
    """
    wide = weight[copied(weight.shape[0], shape[0], groups)]
    if weight.ndim == 1 or weight.shape[1] == shape[1]:
        return wide
    source = copied(weight.shape[1], shape[1], groups)
    copies = torch.bincount(source).to(weight.dtype)
    extra = SPREAD * weight.std() * torch.randn(wide.shape[:1] + shape[1:], generator=generator, dtype=weight.dtype)
    mean = torch.zeros_like(wide).index_add_(1, source, extra) / _broadcast(copies, weight.ndim)
    return wide[:, source] / _broadcast(copies[source], weight.ndim) + extra - mean[:, source]


def _broadcast(values: Tensor, ndim: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (ndim - 2))


def widened_state(state: State, wide: HunyuanVAEConfig, seed: int) -> State:
    """Weights of the ``wide`` autoencoder that computes what the one of ``state`` does (Net2Net, arXiv:1511.05641).

    Exact up to rounding where each decoder width is a whole multiple of the former one; elsewhere the statistics of
    GroupNorms differ a little, as some channels of a group have more copies than others.
    """
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in AutoencoderKLCausal3D(wide).state_dict().items()}
    generator, groups = torch.Generator().manual_seed(seed), wide.norm_num_groups
    result = {}
    for key, value in {**state, **_new_shortcuts(state, shapes)}.items():
        weight = widen(value.float(), shapes[key], groups, generator)
        if (
            ".to_q." in key
        ):  # a product of queries and keys sums over all copies, and is divided by the root of the width
            source = copied(value.shape[0], weight.shape[0], groups)
            share = math.sqrt(len(source) / value.shape[0]) / torch.bincount(source)[source]
            weight = weight * share.reshape(-1, *[1] * (weight.ndim - 1))
        result[key] = weight.to(value.dtype)
    return result


def _new_shortcuts(state: State, shapes: dict[str, torch.Size]) -> State:
    """Projections of residual blocks that need one only now, as the identity they stand for."""
    found = {}
    for key in shapes.keys() - state.keys():
        block, _, name = key.partition(".conv_shortcut.conv.")
        channels = state[f"{block}.norm1.weight"]
        identity = torch.eye(len(channels), dtype=channels.dtype)[..., None, None, None]
        found[key] = identity if name == "weight" else torch.zeros_like(channels)
    return dict(sorted(found.items()))


def wide_config(narrow: HunyuanVAEConfig, channels: list[int]) -> HunyuanVAEConfig:
    """The layout with decoder widths ``channels``.

    Raises:
        UserError: a width that no GroupNorm divides, is less than before, equals its neighbour's where it did not
            before (a residual block there would lose its projection), or a wrong number of them.
    """
    fields = {**vars(narrow), "decoder_block_out_channels": channels}
    wide = HunyuanVAEConfig(**fields)
    given = " ".join(map(str, channels))
    for old, new in zip(narrow.decoder_channels, channels):
        if new < old:
            raise UserError(f"--channels {given}: {new} is less than the {old} that there are")
    for before, after in zip(pairwise(narrow.decoder_channels), pairwise(channels)):
        if len({*before}) > len({*after}):
            raise UserError(
                f"--channels {given}: {after[0]} twice, in place of {before[0]} and {before[1]}; they must differ"
            )
    return wide


def main(argv: list[str] | None = None) -> None:
    """Read the command line and widen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="weights of a causal video autoencoder (hunyuan_vae)")
    add_output(parser)
    parser.add_argument("--channels", type=int, nargs="+", required=True, help="decoder widths, the finest level first")
    parser.add_argument("--norm-groups", type=int, default=32, help="groups of its GroupNorms (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of what copies of a channel count for (default: 0)")
    args = parser.parse_args(argv)
    check_output(args)
    weights = open_weights(args.source)
    with naming(args.source):
        narrow = video_config(weights.shapes, norm_num_groups=args.norm_groups)
        wide = wide_config(narrow, args.channels)
    state = widened_state(read(weights, args.dtype), wide, args.seed)
    save_safetensors(state, args.output, recorded(weights))
    print(f"{args.output}: ae.decoder_block_out_channels={args.channels}")


if __name__ == "__main__":
    run_main(main)
