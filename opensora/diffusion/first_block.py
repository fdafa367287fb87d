"""First-block cache: the other blocks are left out while the first one does much the same as when they last ran.

The idea is that of ParaAttention's FBCache, after TeaCache (arXiv:2411.19108): how much the first block's contribution
to the image tokens has changed tells how much that of the others has. Approximate; ``tools/benchmark/step_caches.py``
measures the loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora.diffusion.step_cache import DEFAULT_THRESHOLD
from opensora.models.diffusion import SplitBlocks
from opensora.models.mmdit.attention import Rotary
from opensora.models.mmdit.model import RunBlocks
from opensora.utils.errors import UserError

Row = tuple[str, int]  # guidance branch, sample of the batch


class Kept(NamedTuple):
    """Of the last evaluation of a row in which all blocks ran.

    Attributes:
        change: ``[N, C]`` that the first block added to the image tokens.
        size: its magnitude, summed over all tokens, also those of other ranks.
        added: ``[N, C]`` that the other blocks added.
    """

    change: Tensor
    size: Tensor
    added: Tensor


class FirstBlockCache:
    """Step cache ``first_block``, see :class:`opensora.diffusion.step_cache.StepCache`.

    Every row is decided on by itself: the other blocks are left out where ``mean |change - kept change| / mean |kept
    change|`` is below the threshold, and what they added when they last ran is added again. It is compared with that
    evaluation however long ago it was (guidance that oscillates leaves branches out), so that errors do not add up
    unseen. In the first and the last step all blocks run.

    Args:
        num_steps: of the run.
        threshold: relative change of what the first block adds.

    Attributes:
        evaluated, reused: rows so far, by sample of the batch: all, and those that left blocks out.
    """

    def __init__(self, num_steps: int, threshold: float = DEFAULT_THRESHOLD) -> None:
        self.last_step, self.threshold = num_steps - 1, threshold
        self.kept: dict[Row, Kept] = {}
        self.evaluated: list[int] = []
        self.reused: list[int] = []

    def around_blocks(
        self, run: RunBlocks, img: Tensor, txt: Tensor, vec: Tensor, rope: Rotary, branch: tuple[str, ...], step: int
    ) -> Tensor:
        """See :meth:`opensora.diffusion.step_cache.StepCache.around_blocks`.

        Raises:
            UserError: the model's first block cannot be run by itself.
        """
        if not isinstance(run, SplitBlocks):
            raise UserError("step_cache first_block needs a model whose first block can be run by itself (the MMDiT)")
        rows = [(name, sample) for name in branch for sample in range(len(img) // len(branch))]
        after, txt = run.first(img, txt, vec, rope)
        change = after - img
        stale = self._stale(run, rows, change, step)
        self._count(rows, stale)
        out: dict[int, Tensor] = {}
        if stale:
            tokens = (after, txt, vec, rope)
            ran = run.rest(*(tokens if len(stale) == len(rows) else (_take(x, stale) for x in tokens)))
            self._keep(run, rows, change, stale, after, ran)
            if len(stale) == len(rows):
                return ran
            out = dict(zip(stale, ran))
        return torch.stack([out[i] if i in out else after[i] + self.kept[row].added for i, row in enumerate(rows)])

    def _stale(self, run: SplitBlocks, rows: Sequence[Row], change: Tensor, step: int) -> list[int]:
        """Numbers of the rows in which all blocks must run."""
        known = [i for i, row in enumerate(rows) if row in self.kept]
        if not known or step in (0, self.last_step):
            return [*range(len(rows))]
        kept = [self.kept[rows[i]] for i in known]
        moved = run.row_sizes(_take(change, known) - torch.stack([each.change for each in kept]))
        distances = (moved / torch.stack([each.size for each in kept])).tolist()
        alike = {i for i, distance in zip(known, distances) if distance < self.threshold}  # NaN is not
        return [i for i in range(len(rows)) if i not in alike]

    def _keep(
        self, run: SplitBlocks, rows: Sequence[Row], change: Tensor, stale: Sequence[int], after: Tensor, ran: Tensor
    ) -> None:
        changes = _take(change, stale)
        kept = zip(changes, run.row_sizes(changes), ran - _take(after, stale))
        for i, each in zip(stale, kept):
            # a copy of its own, or a row would hold on to the whole batch
            self.kept[rows[i]] = Kept(*(x.clone() for x in each)) if len(stale) > 1 else Kept(*each)

    def _count(self, rows: Sequence[Row], stale: Sequence[int]) -> None:
        if not self.evaluated:
            self.evaluated, self.reused = ([0] * (1 + max(sample for _, sample in rows)) for _ in range(2))
        for i, (_, sample) in enumerate(rows):
            self.evaluated[sample] += 1
            self.reused[sample] += i not in stale


def _take(x: Any, rows: Sequence[int]) -> Any:
    """Some rows of a tensor, or of a tuple of them."""
    if isinstance(x, Rotary):
        return Rotary(*(_take(part, rows) for part in x))
    return x[list(rows)]
