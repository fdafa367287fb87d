"""What a kind of quantised weight is. Another one is a file, and a name in ``QUANTIZERS`` of the choices::

@QUANTIZERS.register("mine")
class Mine(Quantizer): ...
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.utils.optional import check_module

METADATA = "quantize"  # in the metadata of a weight file: the kind of its weights
TINY = 1e-30  # scale of a row of zeros


class Part(NamedTuple):
    """Shape and dtype of one of the tensors that stand for a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Parts = Mapping[str, Tensor]
"""The tensors that stand for a weight, by the names of :meth:`Quantizer.layout`."""


class Quantizer(ABC):
    """A kind of quantised weight ``[out, in]`` of a linear layer. It has no state: models share one, copies are equal.

    Attributes:
        package: module that it needs beyond torch, and how a user gets it; None if it needs none.
    """

    package: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def check(cls, wanted_by: str) -> None:
        """See that what it needs is installed, without importing it.

        Raises:
            UserError: it is not; says who asked, and what to install.
        """
        if cls.package is not None:
            module, hint = cls.package
            check_module(module, wanted_by, hint)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it takes a weight of this size; another one stays as it is."""
        return True

    @abstractmethod
    def layout(self, rows: int, columns: int) -> dict[str, Part]:
        """Tensors that stand for a weight, of names other than ``weight`` and ``bias``, the same for all sizes."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight as such tensors, contiguous and on its device."""

    @abstractmethod
    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight that the tensors stand for."""

    def linear(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """``x`` ``[..., in]`` -> ``[..., out]`` in its dtype; here by the unpacked weight. Gradients do not pass."""
        return F.linear(x, self.unpack(parts, x.dtype), bias)

    def works_as(self, device: torch.device) -> str:
        """How a device computes with it, for the log."""
        return "weights only, which are unpacked layer by layer"


class RowwiseQuantizer(Quantizer):
    """Every row over a scale of its own: ``qweight`` ``[out, in]`` of one byte, ``scale`` ``[out, 1]``.

    Attributes:
        dtype: of the values.
        most: largest of them; the largest weight of a row becomes it.
    """

    dtype: ClassVar[torch.dtype]
    most: ClassVar[float]

    def layout(self, rows: int, columns: int) -> dict[str, Part]:
        return {"qweight": Part((rows, columns), self.dtype), "scale": Part((rows, 1), torch.float32)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.float()
        values, scale = self.rows(wide, (wide.abs().amax(1, keepdim=True) / self.most).bfloat16().float())
        return {"qweight": values, "scale": scale}

    def rows(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Values of ``x`` ``[rows, columns]`` float32 over ``scale`` ``[rows, 1]``, and that scale, which is not 0."""
        scale = scale.clamp_min(TINY)
        values = (x / scale).clamp_(-self.most, self.most)
        return (values if self.dtype.is_floating_point else values.round_()).to(self.dtype), scale

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float16:  # which has no room for small scales
            return (parts["qweight"].float() * parts["scale"]).to(dtype)
        return parts["qweight"].to(dtype) * parts["scale"].to(dtype)  # scales are bf16 numbers, so this is exact
