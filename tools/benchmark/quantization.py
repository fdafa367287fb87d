"""What quantised weights lose and save: ``python tools/benchmark/quantization.py [--quick]``.

On the demo model, the videos of ``tools/demo/evaluate.py`` are made with exact weights and with those of each kind; a
row has the share of videos that show what was asked for, and PSNR against the exact ones. On one double and one single
block of the released size, with random weights, a row has the error of what the block adds to its tokens, and the size.
Kinds are named as in ``--model.quantize``; ``fp8*`` has activations in fp8 too, as GPUs with such products do it, and a
kind after ``t5:`` is of the text encoder. Keys of the config can be overridden as in the inference script.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.benchmark.measuring import markdown
from opensora.config import parse_config, run_main
from opensora.config.choices import QUANTIZERS
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.models.mmdit import MMDiTModel
from opensora.models.mmdit.attention import Rotary, rotary_table
from opensora.models.mmdit.loading import quantization
from opensora.models.quantization.fp8 import Fp8
from opensora.models.quantization.kinds import Parts
from opensora.models.quantization.linear import QuantizedLinear
from tools.arguments import Bounded
from tools.benchmark.cases import mmdit_config
from tools.demo.analyse import psnr
from tools.demo.evaluate import Case, generate, plan_cases, summarise
from tools.demo.options import add_cases

WITH_ACTIVATIONS = "fp8*"
KINDS = ("fp8", WITH_ACTIVATIONS, "int8", "nf4", "t5:fp8", "t5:int8", "t5:nf4")
IMAGE, TEXT = 256, 64  # tokens of a block's inputs


class Fp8Products(Fp8):
    """fp8 as on GPUs that have such products, wherever it runs."""

    def linear(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """The product in fp8, whatever the dtype of ``x``."""
        return self.product(x.bfloat16(), parts, None if bias is None else bias.bfloat16()).to(x.dtype)


@dataclass(frozen=True)
class VideoRow:
    """A kind of weights over all videos.

    Attributes:
        weights: the kind; ``none`` is exact.
        text, picture: share of videos from text, and from a picture, that show what was asked for.
        psnr, lowest: dB of the videos against the exact ones, median and lowest.
    """

    weights: str
    text: float
    picture: float
    psnr: float
    lowest: float


@dataclass(frozen=True)
class BlockRow:
    """A kind of weights in one block of each sort.

    Attributes:
        weights: the kind; ``bf16`` is bf16 against float32.
        double, single: error of what the block adds to its tokens, relative.
        mib_double, mib_single: of all weights of the block.
    """

    weights: str
    double: float
    single: float
    mib_double: float
    mib_single: float


def pipeline(config: str, rest: Sequence[str], kind: str) -> VideoPipeline:
    """The config's pipeline with weights of a kind."""
    name, _, of_t5 = kind.rpartition(":")
    words = [] if kind == "none" else [f"--{name or 'model'}.quantize", of_t5.removesuffix("*")]
    pipe = VideoPipeline.from_config(parse_config([config, *rest, *words], InferenceOptions))
    if kind == WITH_ACTIVATIONS:
        use_products(pipe.models["model"])
    return pipe


def use_products(model: nn.Module) -> None:
    """Have a model with fp8 weights quantise its activations."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.quantizer = Fp8Products()


def of_videos(pipe: VideoPipeline, cases: Sequence[Case], exact: Sequence[Case], kind: str) -> VideoRow:
    """Make the videos of all cases, and compare them with the exact ones (which may be the same cases)."""
    generate(pipe, cases, batch_size=8)
    table = summarise(cases)
    pairs = ((case.frames, other.frames) for case, other in zip(cases, exact, strict=True))
    decibels = [psnr(made, other) for made, other in pairs if made is not None and other is not None]
    text, picture = (table[name]["all"] if name in table else float("nan") for name in ("both", "i2v"))
    row = VideoRow(kind, text, picture, statistics.median(decibels), min(decibels))
    print(row, flush=True)
    return row


@torch.no_grad()
def of_blocks(hidden: int, kinds: Sequence[str], dtype: torch.dtype = torch.bfloat16) -> list[BlockRow]:
    """Errors of one double and one single block of random weights, against float32."""
    torch.manual_seed(0)
    model = MMDiTModel(mmdit_config(hidden, 1, 1, fused=False, cond_embed=False))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=hidden**-0.5)
    tokens = torch.randn(1, IMAGE, hidden), torch.randn(1, TEXT, hidden), torch.randn(1, hidden)
    rope = rotary_table(torch.zeros(1, IMAGE + TEXT, 3), model.config.axes_dim, model.config.theta)
    exact = added(model, *tokens, rope)
    img, txt, vec = (x.to(dtype) for x in tokens)
    rows = []
    for kind in ("bf16", *kinds):
        changed = copy.deepcopy(model).to(dtype)
        if kind != "bf16":
            quantization(kind.removesuffix("*")).replace_filled(changed)
        if kind == WITH_ACTIVATIONS:
            use_products(changed)
        double, single = (
            float((found - other).norm() / other.norm())
            for found, other in zip(added(changed, img, txt, vec, rope), exact, strict=True)
        )
        blocks = changed.double_blocks[0], changed.single_blocks[0]
        sizes = [sum(p.nbytes for p in block.parameters()) / 2**20 for block in blocks]
        rows.append(BlockRow(kind, double, single, sizes[0], sizes[1]))
        print(rows[-1], flush=True)
    return rows


def added(model: MMDiTModel, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary) -> list[Tensor]:
    """What the double block adds to its image tokens, and the single one to all, float32."""
    out, _ = model.double_blocks[0](img.clone(), txt.clone(), vec, rope)
    joined = torch.cat((txt, img), dim=1)
    return [out.float() - img.float(), model.single_blocks[0](joined.clone(), vec, rope).float() - joined.float()]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffusion/inference/demo.py", help="inference config")
    add_cases(parser)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="kinds to measure")
    parser.add_argument(
        "--hidden",
        type=int,
        action=Bounded,
        least=0,
        most=2**17,
        default=3072,
        help="width of the blocks; 0 measures none",
    )
    parser.add_argument("--quick", action="store_true", help="two videos, narrow blocks: to see that it works")
    args, rest = parser.parse_known_args(argv)
    of_model = [kind for kind in args.kinds if ":" not in kind]
    for kind in args.kinds:
        name = kind.rpartition(":")[2].removesuffix("*")
        QUANTIZERS.get(name).check(f"--kinds {kind}")
    torch.set_num_threads(1)

    def cases() -> list[Case]:
        found = plan_cases(args.num_seen, args.i2v, args.seed)
        return [found[0], found[-1]] if args.quick else found

    exact, rows = cases(), []
    for kind in ("none", *args.kinds):
        made = exact if kind == "none" else cases()
        rows.append(of_videos(pipeline(args.config, rest, kind), made, exact, kind))
    pictures = sum(case.picture is not None for case in exact)
    print(f"\n{len(exact)} videos, {pictures} of them from a picture\n")
    print(markdown([dataclasses.asdict(row) for row in rows]))
    if args.hidden:
        hidden = 128 * 3 if args.quick else args.hidden
        blocks = of_blocks(hidden, of_model)
        print(f"\none block of each sort, {hidden} wide, {IMAGE} image and {TEXT} text tokens\n")
        print(markdown([dataclasses.asdict(row) for row in blocks]))


if __name__ == "__main__":
    run_main(main)
