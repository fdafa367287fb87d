"""From prompts and references to what the model is conditioned on: text embeddings and reference latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.parallel_vae import together
from opensora.diffusion.conditions import get_condition
from opensora.diffusion.decode import fitting_tiles
from opensora.diffusion.free import FreeCondition, PlacedLatents
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.references import Source, read_clips, read_placed
from opensora.models.autoencoder import Autoencoder

REFERENCE_SEED_OFFSET = 0x5DEECE66D  # keeps posterior noise apart from the starting noise of the same seed


def embed_texts(embedder: nn.Module, texts: Sequence[str], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Texts [B, ...] as a text encoder embeds them; equal texts are embedded once."""
    embed: Any = embedder
    unique = list(dict.fromkeys(texts))
    rows = torch.tensor([unique.index(text) for text in texts], device=device)
    return embed(unique).to(device, dtype)[rows]


def encode_references(
    ae: Autoencoder,
    sources: Sequence[Sequence[Source] | None],
    plan: SamplePlan,
    seeds: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    room: int | None = None,
) -> list[list[Tensor] | PlacedLatents | None]:
    """Latents [C, T', h, w] of each sample's references, one per given run of the plan's condition; None without. Of a
    condition of which each sample says what it gives they come with their places.

    The posterior is sampled with a stream of the sample's own seed.

    Args:
        ae: autoencoder on ``device``.
        sources: local references per sample.
        plan: sizes and condition.
        seeds: per sample.
        device, dtype: of the latents.
        room: bytes of the device's memory that tiles are chosen by; None: they are those of the config.

    Raises:
        UserError: a reference that cannot be read or is too short.
    """
    encoded: list[list[Tensor] | PlacedLatents | None] = []
    is_free = isinstance(get_condition(plan.cond_type), FreeCondition)
    for of_sample, seed in zip(sources, seeds):
        if not of_sample:
            encoded.append(None)
            continue
        generator = torch.Generator("cpu").manual_seed(seed ^ REFERENCE_SEED_OFFSET)
        placed = None
        if is_free:
            placed = read_placed(of_sample, plan)
            clips = placed.clips if placed.whole is None else [*placed.clips, placed.whole]
        else:
            clips = read_clips(of_sample, plan.cond_type, plan.spec, plan.height, plan.width)
        pixels = [clip[None].to(device, dtype) for clip in clips]
        latents = []
        for clip in pixels:
            with ae.in_tiles(fitting_tiles(ae, clip.shape[2:], dtype, room, encode=True)), together(ae):
                latents.append(ae.encode(clip, generator=generator)[0])
        if placed is None:
            encoded.append(latents)
        else:
            count = len(placed.clips)
            encoded.append(PlacedLatents(placed.spans, latents[:count], placed.cells, latents[count:]))
    return encoded
