"""Adapters whose change of a weight is a product of several matrices: LoHa and LoKr, as LyCORIS stores them
(arXiv:2108.06098, arXiv:2309.14859)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w2")
PARTS = (*LOHA, *LOKR, *(f"{name}_{part}" for name in LOKR for part in "ab"))


@dataclass(frozen=True)
class Product:
    """A change of a weight, by its factors: LoHa is ``(w1_a w1_b) * (w2_a w2_b)``, LoKr is ``w1 (x) w2`` (Kronecker).

    Attributes:
        kind: ``LoHa`` or ``LoKr``.
        factors: the two matrices; one that is stored as a product of two is a pair.
    """

    kind: str
    factors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that it is for."""
        (a, b), (c, d) = ((factor[0].shape[0], factor[-1].shape[1]) for factor in self.factors)
        return (a, b) if self.kind == "LoHa" else (a * c, b * d)

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None of a LoKr of two whole matrices, which has no scale."""
        ranks = [len(factor[1]) for factor in self.factors if len(factor) == 2]
        return ranks[-1] if ranks else None

    def dense(self, scale: float = 1.0) -> Tensor:
        """The change [out, in], in fp32."""
        one, other = (torch.linalg.multi_dot(each) if len(each) > 1 else each[0] for each in self.factors)
        return (one * other if self.kind == "LoHa" else torch.kron(one, other)) * scale


def product_of(tensors: Mapping[str, Tensor]) -> Product | str | None:
    """The product that a module's tensors are, what is wrong with them, or None if they are of another kind."""
    names = [name for name in PARTS if name in tensors]
    if not names:
        return None
    kind = "LoHa" if names[0] in LOHA else "LoKr"
    groups: list[tuple[str, ...]] = [LOHA[:2], LOHA[2:]]  # names of the parts of each of the two matrices
    if kind == "LoKr":
        groups = [(name,) if name in tensors else (f"{name}_a", f"{name}_b") for name in LOKR]
    due = [name for group in groups for name in group]
    lacking, more = ([each for each in one if each not in other] for one, other in ((due, names), (names, due)))
    if lacking or more:
        return f"{kind} {'without' if lacking else 'with'} {', '.join(lacking or more)}"
    first, second = (tuple(tensors[name].float() for name in group) for group in groups)
    if any(part.ndim != 2 for part in (*first, *second)):
        return f"{kind} of a convolution"
    chained = all(len(each) == 1 or each[0].shape[1] == len(each[1]) for each in (first, second))
    whole = [(factor[0].shape[0], factor[-1].shape[1]) for factor in (first, second)]
    if not chained or (kind == "LoHa" and whole[0] != whole[1]):
        return f"{kind} whose matrices do not fit one another"
    return Product(kind, (first, second))
