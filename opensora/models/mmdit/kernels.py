"""Attention kernels that are not on every device: backends of torch, and packages; and which one is fastest where.

Kernels take and return ``[B, L, H, D]``.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.optional import require

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128  # that all of these kernels take
HOPPER, BLACKWELL = 9, 10  # compute capabilities, of data-centre cards
NEEDS_AMPERE = "an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; 'sdpa' runs everywhere"


def is_importable(module: str) -> bool:
    """Whether a module is there; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Card:
    """What a choice of kernel depends on.

    Attributes:
        capability: compute capability of the NVIDIA GPU; None without one.
        cudnn: whether torch has cuDNN.
        has_module: whether a package is installed.
    """

    capability: tuple[int, int] | None = None
    cudnn: bool = False
    has_module: Callable[[str], bool] = is_importable

    @classmethod
    def here(cls) -> "Card":
        """Of this process's first GPU. AMD's numbers count something else: such a GPU is taken for an Ampere one."""
        if not torch.cuda.is_available():
            return cls()
        if torch.version.hip:
            return cls((8, 0))
        return cls(torch.cuda.get_device_capability(), torch.backends.cudnn.is_available())

    def since(self, major: int) -> bool:
        """Whether there is a GPU of this compute capability or a newer one."""
        return self.capability is not None and self.capability[0] >= major


@dataclass(frozen=True)
class TorchKernel:
    """A kernel of torch's scaled dot product attention by its own name, where that one would choose.

    Attributes:
        backend: in ``torch.nn.attention.SDPBackend``.
    """

    backend: str

    def require(self, name: str, card: Card) -> None:
        """Raise a UserError where the kernel, chosen as ``name``, does not run."""
        if not card.since(8) or (name == "cudnn" and not card.cudnn):
            raise UserError(f"attn_backend={name!r} needs {NEEDS_AMPERE}.")

    def load(self, name: str, card: Card) -> AttentionKernel:
        """The kernel. Raises as :meth:`require`; what it returns, for numbers that are not of 16 bits."""
        self.require(name, card)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, self.backend)

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if q.dtype not in HALF:
                raise UserError(f"attn_backend={name!r} works in bf16 and fp16: choose --dtype bf16, or 'sdpa'")
            with sdpa_kernel(backend):
                return attention_sdpa(q, k, v)

        return kernel


@dataclass(frozen=True)
class OptionalKernel:
    """An attention kernel of a package that is not part of torch; they run on GPUs in float16 or bfloat16 only.

    Attributes:
        module: to import when the kernel is chosen.
        function: its kernel; of a tuple that it returns the first part is taken (some also return the log-sum-exp).
        hint: how a user gets it.
        approximate: results differ by more than rounding; for sampling only.
        keywords: that the kernel is called with.
        hub: where the package ``kernels`` finds it, if the module is not there.
        builtin: torch's own one, if the module is not there.
    """

    module: str
    function: str
    hint: str
    approximate: bool = False
    keywords: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    hub: str | None = None
    builtin: TorchKernel | None = None

    def require(self, name: str, card: Card) -> Any:
        """The module; a UserError tells a user that chose the kernel as ``name`` how to get it."""
        if self.hub is not None and not card.has_module(self.module) and card.has_module("kernels"):
            try:
                return require("kernels", f"attn_backend={name!r}", self.hint).get_kernel(self.hub)
            except Exception as error:  # whatever a download or a build raises
                raise UserError(f"attn_backend={name!r}: the package kernels has no {self.hub} ({error})") from error
        return require(self.module, f"attn_backend={name!r}", self.hint)

    def load(self, name: str, card: Card) -> AttentionKernel:
        """The kernel. Raises as :meth:`require`."""
        if self.builtin is not None and not card.has_module(self.module) and card.since(8):
            return self.builtin.load(name, card)
        function = getattr(self.require(name, card), self.function)

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.approximate and torch.is_grad_enabled() and q.requires_grad:
                raise UserError(f"attn_backend={name!r} is for sampling: it has no backward pass")
            out = function(q, k, v, **self.keywords)
            return out[0] if isinstance(out, tuple) else out

        return kernel


cudnn = TorchKernel("CUDNN_ATTENTION")
flash3 = OptionalKernel(
    "flash_attn_interface",
    "flash_attn_func",
    "build the `hopper` folder of github.com/Dao-AILab/flash-attention (H100/H200), or `pip install kernels`",
    hub="kernels-community/flash-attn3",
)
flash2 = OptionalKernel(
    "flash_attn",
    "flash_attn_func",
    "`pip install flash-attn --no-build-isolation` (needs nvcc)",
    builtin=TorchKernel("FLASH_ATTENTION"),
)
xformers = OptionalKernel("xformers.ops", "memory_efficient_attention", "`pip install xformers`")
sage = OptionalKernel(
    "sageattention",
    "sageattn",
    "`pip install sageattention`, or build github.com/thu-ml/SageAttention (arXiv:2410.02367; NVIDIA GPU)",
    approximate=True,
    keywords=MappingProxyType({"tensor_layout": "NHD"}),
)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled dot product attention: runs everywhere and picks flash, cuDNN or CPU kernels itself."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def prefers_cudnn(card: Card) -> bool:
    """Whether cuDNN's kernel is faster than FlashAttention-2: on data-centre cards since Hopper."""
    return card.cudnn and card.capability is not None and card.capability[0] in (HOPPER, BLACKWELL)


def fastest(card: Card) -> str:
    """Name of the fastest exact kernel that is there. On an H100, at the lengths of a video, cuDNN makes 595 to 625
    TFLOP/s and FlashAttention-2 332 to 355; what torch would pick depends on its version."""
    if card.capability is None:
        return "sdpa"
    if card.capability[0] == HOPPER and card.has_module(flash3.module):  # compiled for Hopper only
        return "flash3"
    if prefers_cudnn(card):
        return "cudnn"
    if card.since(8) and card.has_module(flash2.module):
        return "flash2"
    return "xformers" if card.has_module(xformers.module) else "sdpa"


def where_it_can(kernel: AttentionKernel) -> AttentionKernel:
    """A kernel for the inputs that all fast ones take, `attention_sdpa` for others: ``auto`` must always run."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fits = q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_HEAD_DIM
        return kernel(q, k, v) if fits else attention_sdpa(q, k, v)

    return attend
