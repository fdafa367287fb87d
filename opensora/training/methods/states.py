"""Inputs of the model at states of a teacher's trajectories, from a batch of ``dataset.type = "trajectories"``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opensora.diffusion.latents import pack, prepare_ids


def state_inputs(batch: Mapping[str, Any], state: Tensor, times: Tensor, patch: int, guidance: float) -> dict[str, Any]:
    """Keyword arguments of the model.

    Args:
        batch: texts and condition of the trajectories.
        state: [B, C, t, h, w], one of each trajectory.
        times: its time [B].
        patch: latent pixels per token side.
        guidance: scale told to models that embed it.
    """
    text = batch["text_t5"]
    size: tuple[int, int, int] = (state.shape[2], state.shape[3], state.shape[4])
    img_ids, txt_ids = prepare_ids(len(state), size, patch, text.shape[1], state.device)
    inputs = {
        "img": pack(state, patch).to(text.dtype),
        **{"img_ids": img_ids, "txt": text, "txt_ids": txt_ids},
        "timesteps": times.to(text),
        "y_vec": batch["text_clip"],
        "guidance": torch.full((len(state),), guidance, device=state.device),
    }
    return {**inputs, "cond": pack(batch["condition"], patch)} if "condition" in batch else inputs
