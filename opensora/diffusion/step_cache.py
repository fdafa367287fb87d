"""Step caches: what runs the transformer's blocks when consecutive evaluations are alike, by name.

A cache is put around the blocks of the MMDiT (:meth:`opensora.models.mmdit.MMDiTModel.run_blocks`), inside of sampling
only. It may run them for all rows of a batch, for some, or not at all and give back what it kept. What it makes is
approximate: none is used unless it is asked for. One is added from outside, as a function of the number of steps that
is called once per run (so that nothing is kept from one run to the next)::

    @STEP_CACHES.register("mine")
    def mine(num_steps: int, threshold: float = 0.2) -> StepCache:
        return MyCache(threshold, never_after=num_steps - 5)

and chosen by ``--sampling_option.step_cache mine``, for this one also with ``--step-cache THRESHOLD``: a threshold goes
to caches that have an argument of the name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from opensora.config.choices import STEP_CACHES as STEP_CACHES
from opensora.models.mmdit.attention import Rotary
from opensora.models.mmdit.model import RunBlocks
from opensora.utils.errors import UserError

DEFAULT_THRESHOLD = 0.1
DEFAULT_KIND = "first_block"


class StepCache(Protocol):
    """What a step cache is."""

    def around_blocks(
        self,
        run: RunBlocks,
        img: Tensor,  # [n * B, N, C] image tokens as they come to the first block
        txt: Tensor,  # [n * B, L, C] text tokens
        vec: Tensor,  # [n * B, C] embedded time, pooled text and scale
        rope: Rotary,  # rotary table of text then image tokens
        branch: tuple[str, ...],
        step: int,
    ) -> Tensor:
        """Image tokens ``[n * B, N, C]`` after the last block.

        Args:
            run: the blocks, ``run(img, txt, vec, rope)``. It may be called with some of the rows. The MMDiT's can also
                be run in two goes, see :class:`opensora.models.diffusion.SplitBlocks`.
            img, txt, vec, rope: for ``run``.
            branch: names of the n guidance branches in the batch (``prompt``, ``negative``, ``negative_no_image``),
                in the order of its chunks of B rows. A step does not run every branch, and branches may come one by
                one: what is kept must be kept by branch.
            step: index of the step that is made; a solver may ask several times in one, at different times, which
                ``vec`` tells apart.

        With sequence parallelism the tokens are a rank's own: ranks must decide alike. So that a sample does not
        depend on those it shares a batch with, rows must be decided on one by one.
        """
        ...


@runtime_checkable
class CountedStepCache(StepCache, Protocol):
    """A cache that counts, by sample of the batch, rows that came to it and rows for which it left blocks out."""

    evaluated: list[int]
    reused: list[int]


MakeStepCache = Callable[..., StepCache]
"""What :data:`STEP_CACHES` holds: from the number of steps of a run (and a ``threshold``) to a cache for it."""


@dataclass(frozen=True)
class StepCacheChoice:
    """Which cache a run uses.

    Attributes:
        kind: name in :data:`STEP_CACHES`.
        threshold: how much change it takes for none; None is the kind's own.
    """

    kind: str
    threshold: float | None = None

    @classmethod
    def of(cls, kind: str | None, threshold: float | None) -> "StepCacheChoice | None":
        """What the keys ``step_cache`` and ``step_cache_threshold`` of ``sampling_option`` ask for; a threshold of 0 is
        no cache, and any other one alone is for the default kind.

        Raises:
            UserError: no such kind, or a threshold for one that takes none.
        """
        if threshold == 0 or (kind is None and threshold is None):
            return None
        choice = cls(kind or DEFAULT_KIND, threshold)
        known = inspect.signature(STEP_CACHES.get(choice.kind)).parameters
        if "threshold" in known:
            default = known["threshold"].default
            return choice if threshold is not None else cls(choice.kind, default)
        if threshold is not None:
            raise UserError(f"sampling_option.step_cache_threshold={threshold}: {choice.kind} takes no threshold")
        return choice

    def __str__(self) -> str:
        return self.kind if self.threshold is None else f"{self.kind} (threshold {self.threshold:g})"

    def make(self, num_steps: int) -> StepCache:
        """A cache for one run."""
        given = {} if self.threshold is None else {"threshold": self.threshold}
        cache: StepCache = STEP_CACHES.get(self.kind)(num_steps, **given)
        return cache
