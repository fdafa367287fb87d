"""Muon on matrices that ranks hold rows of."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Muon


class DividedMuon(Muon):
    """torch's Muon, which also takes matrices whose rows are divided over ranks (FSDP2's).

    Momentum stays where the rows are. Of as many matrices as there are ranks, each rank then gets one whole, in bf16,
    which is what Newton-Schulz computes in; it orthogonalises that, and sends every rank its rows back. So each matrix
    is worked on once, and every rank works. The numbers are those of one process.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            matrices: list[Any] = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            ranks = _group_of(matrices[0])
            matrices.sort(key=lambda p: p.numel(), reverse=True)  # so that ranks have equal work at a time
            for start in range(0, len(matrices), dist.get_world_size(ranks)):
                self._update(matrices[start : start + dist.get_world_size(ranks)], group, ranks)
        return loss

    def _update(self, matrices: Sequence[DTensor], group: Mapping[str, Any], ranks: Any) -> None:
        """One step of up to as many matrices as there are ranks."""
        rows = [_rows_of(p.shape[0], dist.get_world_size(ranks)) for p in matrices]
        own = [self._direction(p, group) for p in matrices]
        whole = _to_owners(own, rows, ranks)
        if whole is not None:
            whole = newton_schulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for p, update in zip(matrices, _from_owners(whole, own, rows, ranks)):
            rate = group["lr"] * 0.2 * max(p.shape) ** 0.5  # "match_rms_adamw"
            assert group["adjust_lr_fn"] == "match_rms_adamw"
            p.to_local().mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _direction(self, p: DTensor, group: Mapping[str, Any]) -> Tensor:
        """This rank's rows of what is to be orthogonalised (Nesterov's momentum), in bf16."""
        state, grad = self.state[p], p.grad
        assert isinstance(grad, DTensor)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum, local = state["momentum_buffer"].to_local(), grad.to_local()
        momentum.lerp_(local, 1 - group["momentum"])
        return (local.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum).bfloat16()


def newton_schulz(
    matrix: Tensor,  # [m, n] bf16
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> Tensor:
    """An approximately orthogonal matrix of the same singular vectors, as `torch.optim.Muon` computes it.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _group_of(p: DTensor) -> Any:
    """Ranks that hold rows of a parameter: of two dimensions of a mesh (HSDP), the last."""
    return p.device_mesh.get_group(p.device_mesh.ndim - 1)


def _rows_of(rows: int, ranks: int) -> list[int]:
    """How many of a matrix's rows each rank holds (`torch.chunk`)."""
    size = -(-rows // ranks)
    return [max(0, min(size, rows - rank * size)) for rank in range(ranks)]


def _to_owners(own: Sequence[Tensor], rows: Sequence[Sequence[int]], ranks: Any) -> Tensor | None:
    """Matrix number i, whole, on rank i; None on ranks beyond the last matrix."""
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    sent = [part.numel() for part in own] + [0] * (size - len(own))
    got = [count * own[rank].shape[1] for count in rows[rank]] if rank < len(own) else [0] * size
    flat = _exchanged(torch.cat([part.reshape(-1) for part in own]), sent, got, ranks)
    return flat.view(-1, own[rank].shape[1]) if rank < len(own) else None


def _from_owners(
    whole: Tensor | None, own: Sequence[Tensor], rows: Sequence[Sequence[int]], ranks: Any
) -> list[Tensor]:
    """This rank's rows of every matrix: the inverse of `_to_owners`."""
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    got = [part.numel() for part in own]
    sent = [count * own[rank].shape[1] for count in rows[rank]] if whole is not None else [0] * size
    source = whole.contiguous().view(-1) if whole is not None else own[0].new_empty(0)
    flat = _exchanged(source, sent, got + [0] * (size - len(own)), ranks)
    return [part.view(like.shape) for part, like in zip(flat.split(got), own)]


def _exchanged(flat: Tensor, sent: list[int], got: list[int], ranks: Any) -> Tensor:
    """Pieces of these lengths from every rank, for pieces of those lengths to every rank; as bytes, which every backend
    can send."""
    out = flat.new_empty(sum(got))
    arriving, leaving = ([n * flat.element_size() for n in counts] for counts in (got, sent))
    dist.all_to_all_single(out.view(torch.uint8), flat.view(torch.uint8), arriving, leaving, group=ranks)
    return out
