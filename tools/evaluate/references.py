"""What a sample was made from, as its record tells: the picture of its first frame, and where given frames end."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opensora.datasets.transforms import resize_crop, to_model_range
from opensora.diffusion.conditions import Span, get_spans
from opensora.diffusion.references import split_references
from opensora.utils.errors import UserError
from opensora.utils.video import is_video, read_image, read_video, to_uint8
from tools.evaluate.samples import Sample


def first_reference(sample: Sample) -> Path | None:
    """The file that a sample's head was taken from, or the picture made first; None where neither is at hand."""
    made = sample.path.parent / "generated_condition" / f"{sample.path.stem}.png"
    named = split_references(str(sample.record.get("references") or ""))
    for place in (Path(named[0]) if named else None, sample.path.parent / named[0] if named else None, made):
        if place is not None and place.is_file():
            return place
    return None


def fitted_picture(sample: Sample, size: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """What the first frame of a sample should be, ``[H, W, 3]``, scaled and cut as generation does it.

    None if the sample has no given head, or its reference is gone.
    """
    if not any(span.at == "head" for span in _spans(sample)) or (path := first_reference(sample)) is None:
        return None
    frames = read_video(path, max_frames=1)[0] if is_video(path) else read_image(path)[None]
    return np.asarray(to_uint8(resize_crop(to_model_range(frames[:1]), size[0], size[1]))[0])


def borders(sample: Sample, frames: int) -> list[int]:
    """First frames after the borders between given and made ones of a clip of ``frames``, where several are given."""
    latent = sample.record.get("latent")
    if not isinstance(latent, list) or len(latent) != 4:
        return []
    ratio = max(round((frames - 1) / max(latent[1] - 1, 1)), 1)
    is_causal = frames % ratio == 1 if ratio > 1 else False
    places = []
    for span in _spans(sample):
        if span.groups is not None:
            given = span.pixel_frames(is_causal, ratio)
            places.append(given if span.at == "head" else frames - given)
    return places


def _spans(sample: Sample) -> tuple[Span, ...]:
    try:
        return get_spans(str(sample.record.get("cond_type", "t2v")))
    except UserError:  # a condition of the user's own, whose package is not imported here
        return ()
