"""Step caches: what runs the transformer's blocks when consecutive evaluations are alike, by name.

A cache is put around the blocks of the MMDiT (:meth:`opensora.models.mmdit.MMDiTModel.run_blocks`), inside of sampling
only. It may run them for all rows of a batch, for some, or not at all and give back what it kept. One is added from
outside, as a function of the number of steps that is called once per run (so that nothing is kept from one run to the
next)::

    @STEP_CACHES.register("mine")
    def mine(num_steps: int) -> StepCache:
        return MyCache(every=2, never_after=num_steps - 5)

and chosen by ``--sampling_option.step_cache mine``.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from opensora.config.choices import STEP_CACHES as STEP_CACHES
from opensora.models.mmdit.attention import Rotary
from opensora.models.mmdit.model import RunBlocks


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
            run: the blocks, ``run(img, txt, vec, rope)``. It may be called with some of the rows.
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


MakeStepCache = Callable[[int], StepCache]
"""What :data:`STEP_CACHES` holds: from the number of steps of a run to a cache for it."""
