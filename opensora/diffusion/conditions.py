"""Image and video conditions: one table for training and sampling.

A condition gives the model some latent frames of the video to make. It is handed over as one more latent: a mask
channel, 1 on the given frames, and the reference latents there (0 elsewhere). Both training and sampling read
the table :data:`opensora.config.choices.CONDITIONS`, so they cannot drift apart; a condition of one's own is added with
``CONDITIONS.add("name", (Span(...), ...))``. Where given frames lie is part of such a condition; of those in
:mod:`opensora.diffusion.free` every sample says it.
"""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opensora.config.choices import CONDITIONS
from opensora.datasets.runs import ClipPart, FrameRun
from opensora.diffusion.free import Anywhere, DrawnPart, Extension, FreeCondition, PlacedLatents, Region
from opensora.diffusion.spans import Span as Span
from opensora.models.autoencoder import Autoencoder, LatentSpec
from opensora.utils.errors import UserError

T2V: tuple[Span, ...] = ()
I2V_HEAD = (Span("head", 0),)
I2V_TAIL = (Span("tail", -1),)
I2V_LOOP = (Span("head", 0), Span("tail", -1))
V2V_HEAD = (Span("head", 0, 8),)
V2V_TAIL = (Span("tail", 0, 8),)
V2V_HEAD_EASY = (Span("head", 0, 16),)
V2V_TAIL_EASY = (Span("tail", 0, 16),)
FRAMES = Anywhere()
REGION = Region()
EXTEND_LEFT = Extension(left=True)
EXTEND_RIGHT = Extension(left=False)


def get_condition(cond_type: str) -> tuple[Span, ...] | FreeCondition:
    """A condition by its name.

    Raises:
        UserError: unknown condition type, or one that is something else.
    """
    if not isinstance(cond_type, str) or cond_type not in CONDITIONS:
        raise UserError(f"unknown cond_type {cond_type!r}; valid: {CONDITIONS.listing}")
    found = CONDITIONS.get(cond_type)
    if isinstance(found, FreeCondition):
        return found
    if not isinstance(found, tuple) or not all(isinstance(span, Span) for span in found):
        raise UserError(f"cond_type {cond_type!r} is {found!r}: a condition is a tuple of Span")
    return found


def get_spans(cond_type: str) -> tuple[Span, ...]:
    """Given runs of a condition type, in the order their references are listed; none of one that every sample says
    where (:class:`opensora.diffusion.free.FreeCondition`).

    Raises:
        UserError: unknown condition type.
    """
    found = get_condition(cond_type)
    return () if isinstance(found, FreeCondition) else found


def takes_references(cond_type: str) -> bool:
    """Whether a condition type gives anything at all: all but ``t2v`` do."""
    return bool(get_condition(cond_type))


def drawn_parts(cond_type: str, latent_frames: int, spec: LatentSpec) -> list[DrawnPart]:
    """What training may draw for a free condition of videos of a length; empty for the others."""
    found = get_condition(cond_type)
    if not isinstance(found, FreeCondition):
        return []
    layouts = range(len(found.layouts(latent_frames, spec.is_causal)))
    return [DrawnPart(cond_type, found, number, latent_frames, spec) for number in layouts]


def fits(cond_type: str, latent_frames: int, is_causal: bool) -> bool:
    """Whether a video of so many latent frames leaves something to generate besides the given frames.

    Single frames have no room for a picture condition (they are images), only for ``t2v``.
    """
    found = get_condition(cond_type)
    if isinstance(found, FreeCondition):
        return bool(found.layouts(latent_frames, is_causal))
    return not found or latent_frames > sum(span.latent_frames(is_causal) for span in found)


def build_condition(
    z_like: Tensor,  # [B, C, T, h, w]
    cond_types: str | Sequence[str],
    refs: Sequence[Sequence[Tensor] | PlacedLatents | None],
    is_causal: bool,
) -> Tensor:
    """Mask and masked reference for the model.

    Args:
        z_like: gives shape, dtype and device.
        cond_types: one type for all samples, or one per sample.
        refs: per sample its reference latents [C, T', h, w], or None for an unconditioned sample. A head run takes
            the first frames of its reference, a tail run the last ones. Of a free condition the latents come with
            their places.
        is_causal: whether the autoencoder is causal in time.

    Returns:
        [B, 1 + C, T, h, w]: mask (0 or 1), then the references on given frames and 0 elsewhere. All zero where a
        sample has no reference, is ``t2v``, or T = 1.

    Raises:
        UserError: unknown type, or a reference with fewer frames than the condition needs.
    """
    batch, channels, frames = z_like.shape[:3]
    types = [cond_types] * batch if isinstance(cond_types, str) else list(cond_types)
    assert len(types) == len(refs) == batch, (len(types), len(refs), batch)
    cond = z_like.new_zeros(batch, 1 + channels, *z_like.shape[2:])
    spots: dict[Span, list[tuple[int, Tensor]]] = {}
    for sample, (cond_type, references) in enumerate(zip(types, refs)):
        spans = get_spans(cond_type)
        if not references or frames == 1:
            continue
        if isinstance(references, PlacedLatents):
            _place(cond[sample], references)
            continue
        for span in spans:
            run = span.latent_run(is_causal)
            reference = references[span.reference]
            if reference.shape[1] < run.frames or frames < run.frames:
                raise UserError(
                    f"{cond_type} needs {run.frames} latent frames; the reference has {reference.shape[1]}, "
                    f"the video {frames}"
                )
            spots.setdefault(span, []).append((sample, run.cut(reference)))
    for span, found in spots.items():  # all samples at once: on a GPU, one small copy each would take longer
        rows, place = [sample for sample, _ in found], span.latent_run(is_causal).place(frames)
        cond[rows, 0, place] = 1
        cond[rows, 1:, place] = torch.stack([latents.to(cond) for _, latents in found])
    return cond


def _place(cond: Tensor, given: PlacedLatents) -> None:
    """Fill in the condition ``[1 + C, T, h, w]`` of a sample, zeros before."""
    for span, latents in zip(given.spans, given.latents):
        place = FrameRun(span.at, latents.shape[1]).place(cond.shape[1])
        cells = 1 if given.cells is None else given.cells.to(cond)
        cond[0, place] = cells
        cond[1:, place] = latents.to(cond) * cells


def head_condition(z_like: Tensor, given: Tensor, placed: Sequence[PlacedLatents | None] | None = None) -> Tensor:
    """Mask and masked latents for a video that goes on from latents of its own.

    Args:
        z_like: [B, C, T, h, w], gives shape, dtype and device.
        given: [B, C, t, h, w], its first frames, of any number below T.
        placed: per sample, what else is given, further on; what lies in its first frames has become part of them.

    Returns:
        As :func:`build_condition`, [B, 1 + C, T, h, w].
    """
    cond = z_like.new_zeros(len(z_like), 1 + z_like.shape[1], *z_like.shape[2:])
    for sample, latents in enumerate(placed or ()):
        if latents is not None:
            _place(cond[sample], latents)
    cond[:, 0, : given.shape[2]] = 1
    cond[:, 1:, : given.shape[2]] = given.to(cond)
    return cond


def restore_references(
    z: Tensor,  # [B, C, T, h, w]
    cond_types: str | Sequence[str],
    refs: Sequence[Sequence[Tensor] | PlacedLatents | None],
) -> Tensor:
    """Put given pictures back into sampled latents, for every sample of the batch.

    The model redraws its given frames; for ``i2v_*`` they are replaced by the exact reference latent. Videos given by
    ``v2v_*`` are left as drawn, so that the join stays smooth. Of a free condition, pictures and what is kept of a
    region are put back too. Returns a new tensor.
    """
    types = [cond_types] * len(z) if isinstance(cond_types, str) else list(cond_types)
    z, frames = z.clone(), z.shape[2]
    for sample, (cond_type, references) in enumerate(zip(types, refs)):
        if not references or frames == 1:
            continue
        if isinstance(references, PlacedLatents):
            references.put_back(z[sample])
            continue
        for span in get_spans(cond_type):
            if span.groups is None:
                run = FrameRun(span.at, 1)
                z[sample, :, run.place(frames)] = run.cut(references[span.reference]).to(z)
    return z


def choose_conditions(
    weights: Mapping[str, float],
    batch: int,
    latent_frames: int,
    rng: random.Random,
    is_causal: bool = True,
) -> list[str]:
    """Draw a condition type for each sample of a training batch.

    Args:
        weights: relative weight by condition type; never changed.
        batch: number of samples.
        latent_frames: of this batch; types that would leave nothing to generate are not drawn for it.
        rng: random stream.
        is_causal: whether the autoencoder is causal in time.

    Returns:
        One type per sample; ``t2v`` for images and where no type of ``weights`` fits.
    """
    names = [name for name, weight in weights.items() if fits(name, latent_frames, is_causal) and weight > 0]
    if not names or latent_frames == 1:
        return ["t2v"] * batch
    return rng.choices(names, [weights[name] for name in names], k=batch)


def condition_runs(
    weights: Mapping[str, float] | None, ae: Autoencoder, num_frames: int, window: int | None = None
) -> list[ClipPart]:
    """Parts of the pixels that the conditions of a config may give in clips of this length, in order.

    They are cut from the pixels and encoded on their own, never cut from the encoded video: latents of the whole video
    have seen other frames and would tell the model more than it gets when sampling.

    Args:
        weights: relative weight by condition type.
        ae: autoencoder, on the meta device will do.
        num_frames: pixel frames of the clips.
        window: those of longer clips, that are trained on in windows, go on from their own latents: they give nothing.
    """
    if window is not None and num_frames > window:
        return []
    spec = LatentSpec(ae.compression, ae.is_causal)
    latent_frames = ae.get_latent_size((num_frames, 64, 64))[0]
    names = [
        name
        for name, weight in (weights or {}).items()
        if weight > 0 and latent_frames > 1 and fits(name, latent_frames, ae.is_causal)
    ]
    runs = {span.pixel_run(ae.is_causal, ae.compression[0]) for name in names for span in get_spans(name)}
    return [*sorted(runs), *(part for name in sorted(names) for part in drawn_parts(name, latent_frames, spec))]


def is_image_condition(cond_type: str) -> bool:
    """Whether the condition gives pictures (``i2v_*``) rather than nothing or clips."""
    spans = get_spans(cond_type)
    return bool(spans) and all(span.groups is None for span in spans)
