"""Ways to run the transformer's forward: a function each, which changes a model in place. `variants` lists them.

Attention kernels and kinds of quantised weights are found by name, so those that are registered are measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from opensora.acceleration.compile import compile_blocks
from opensora.config.choices import ATTENTION_KERNELS, QUANTIZERS
from opensora.models.mmdit import MMDiTModel
from opensora.models.mmdit.attention import JointAttention, attention_kernel, rotation
from opensora.models.mmdit.loading import quantization
from tools.benchmark.gpu_parts.bench import Bench

Change = Callable[[MMDiTModel, Bench], None]


@dataclass(frozen=True)
class Variant:
    """A way to run a forward.

    Attributes:
        name: in the table.
        change: makes a model run that way, and may raise where that cannot be.
        check: raises where it cannot be, before there is a model.
        seconds: that it takes on a GPU, about, with what comes before the first forward.
        resolutions: at which it is measured.
    """

    name: str
    change: Change
    seconds: float = 8.0
    resolutions: tuple[str, ...] = ("256px",)
    check: Callable[[], object] = bool


def plain(model: MMDiTModel, bench: Bench) -> None:
    """As it is."""


def attention(model: MMDiTModel, bench: Bench, kernel: str) -> None:
    """Another attention kernel."""
    for module in model.modules():
        if isinstance(module, JointAttention):
            module.kernel = attention_kernel(kernel)


def liger(model: MMDiTModel, bench: Bench) -> None:
    """liger-kernel's rotation."""
    for module in model.modules():
        if isinstance(module, JointAttention):
            module.rotate = rotation(module.half_split, "liger")


def compiled(model: MMDiTModel, bench: Bench) -> None:
    """Every block compiled; toys only traced."""
    compile_blocks(model, "aot_eager" if bench.toy else "inductor")


def quantized(model: MMDiTModel, bench: Bench, kind: str) -> None:
    """Linear layers of the blocks with quantised weights."""
    quantization(kind).replace_filled(model)


def quantized_compiled(model: MMDiTModel, bench: Bench, kind: str) -> None:
    """Both."""
    quantized(model, bench, kind)
    compiled(model, bench)


def variants() -> Iterator[Variant]:
    """All of them, the most telling first."""
    yield Variant("eager", plain, 8, ("256px", "768px"))
    yield Variant("blocks compiled" + ("" if torch.cuda.is_available() else " (traced)"), compiled, 30)
    yield Variant("weights fp8, compiled", partial(quantized_compiled, kind="fp8"), 35)
    for kernel in (name for name in ATTENTION_KERNELS if name not in ("sdpa", "math")):
        found = partial(attention_kernel, kernel)
        yield Variant(f"attention {kernel}", partial(attention, kernel=kernel), 6, ("256px", "768px"), found)
    for kind in QUANTIZERS:
        known = partial(quantization(kind).quantizer, None)
        yield Variant(f"weights {kind}", partial(quantized, kind=kind), 8, check=known)
    yield Variant("liger rope", liger, 6, check=partial(rotation, True, "liger"))
