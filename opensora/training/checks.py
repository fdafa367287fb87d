"""Checks of a training config that both trainers make before anything is built."""

from collections.abc import Mapping
from typing import Any

from opensora.training.checkpoint import RunningStates
from opensora.utils.errors import UserError


def check_frames(bucket_config: Mapping[str, Mapping[int, Any]], ae: Any) -> None:
    """Refuse bucket lengths that the autoencoder cannot take: causal ones make ``rk + 1`` frames, others ``rk`` (or 1).

    Args:
        bucket_config: ``{resolution: {num_frames: ...}}``.
        ae: autoencoder (on the meta device will do) with ``compression`` and ``is_causal``.

    Raises:
        UserError: names the length and the nearest valid ones.
    """
    ratio, extra = ae.compression[0], int(ae.is_causal)
    for resolution, lengths in bucket_config.items():
        for frames in lengths:
            if frames == 1 or (frames - extra) % ratio == 0:
                continue
            lower = max((frames - extra) // ratio * ratio + extra, 1)
            raise UserError(
                f"bucket_config[{resolution!r}]: {frames} frames do not fit this autoencoder, which takes "
                f"{ratio}k{'+1' if extra else ''}; use {lower} or {lower + ratio}"
            )


def check_unfinished(states: RunningStates, total_steps: int) -> None:
    """Refuse to go on from a checkpoint at or past the run's last optimizer step.

    Raises:
        UserError: names both steps.
    """
    if states.global_step >= total_steps:
        raise UserError(
            f"--load: the checkpoint is at step {states.global_step}, the run ends at {total_steps}; "
            "raise max_steps or epochs"
        )
