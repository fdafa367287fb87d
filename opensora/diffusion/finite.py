"""Results are looked at: what is not finite (NaN or infinity) ends a run where it appears, before it is written."""

import torch
from torch import Tensor

from opensora.diffusion.solvers import StepCallback
from opensora.utils.errors import UserError


class NotFiniteError(UserError):
    """A result that is not finite."""


def check_result(batch: Tensor, what: str, advice: str) -> None:
    """Refuse a batch [B, ...] with NaN or infinity.

    Raises:
        NotFiniteError: names ``what``, the samples, and ``advice``.
    """
    finite = torch.isfinite(batch)
    if bool(finite.all()):
        return
    lost = (~finite.flatten(1).all(dim=1)).nonzero().flatten().tolist()
    which = "" if len(batch) == 1 else f" in {len(lost)} of {len(batch)} samples of the batch"
    raise NotFiniteError(f"{what} are not finite (NaN or infinity){which}: try {advice}")


def watched(on_step: StepCallback | None, dtype: torch.dtype) -> StepCallback:
    """The callback, called after the latents of a step were looked at; a pass over them, nothing beside a forward."""
    half = "" if dtype == torch.float32 else f"--dtype fp32 (now {str(dtype).removeprefix('torch.')}), "

    def look(step: int, total: int, x: Tensor) -> None:
        check_result(
            *(x, f"latents after denoising step {step} of {total}"),
            f"{half}lower --guidance, another solver or step cache, a lower strength of --pretrained-lora-path, or "
            "other model weights",
        )
        if on_step is not None:
            on_step(step, total, x)

    return look
