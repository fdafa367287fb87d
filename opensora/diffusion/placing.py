"""Where in a video given frames lie: places as people write them, on the grid that the autoencoder has in time.

A causal autoencoder has a latent for the first frame and one for every further group of (time compression) frames. A
picture is encoded as a first frame and given to the latent whose last frame it is; so are the first frame of a clip,
whose further frames are whole groups. Other frames lie inside of a group, of which no latent can be made without the
frames around them. Where the autoencoder is not causal, a latent is a whole group, and pictures stand for its first
frame (or the last one of the video).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opensora.diffusion.spans import Span
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError


@dataclass(frozen=True)
class Reference:
    """What there is to know of a reference before it is read.

    Attributes:
        name: to tell the user.
        frames: how many it has.
        is_picture: whether it is one.
        place: first frame of the video that it gives, and the last one (None for a picture, and for as much of a clip
            as there is); negative numbers count from the end, -1 being the last frame. None where it does not say.
    """

    name: str
    frames: int
    is_picture: bool
    place: tuple[int, int | None] | None = None

    @property
    def placed_name(self) -> str:
        """The name with its place."""
        if self.place is None:
            return self.name
        first, last = self.place
        return f"{self.name}@{first}" if last is None else f"{self.name}@{first}-{last}"


@dataclass(frozen=True)
class Located:
    """A run that a reference gives.

    Attributes:
        span: of the video's latent.
        end: of the reference that it is taken from.
    """

    span: Span
    end: Literal["head", "tail"] = "head"


def locate_all(references: Sequence[Reference], spec: LatentSpec, num_frames: int) -> list[Located]:
    """Runs of references that say where they lie in a video of ``num_frames``.

    Raises:
        UserError: one says no place, or one that cannot be; two overlap; nothing is left to make.
    """
    spans = [_span(number, reference, spec, num_frames) for number, reference in enumerate(references)]
    latent_frames, taken = spec.latent_size(num_frames, 1, 1)[0], dict[int, int]()
    for number, span in enumerate(spans):
        for frame in range(latent_frames)[span.latent_run(spec.is_causal).place(latent_frames)]:
            other = taken.setdefault(frame, number)
            if other != number:
                raise UserError(
                    f"{references[other].placed_name} and {references[number].placed_name} both give "
                    f"{_frames_of(frame, spec)}: move one of them, or give fewer frames of a clip"
                )
    if len(taken) == latent_frames:
        raise UserError(f"the references fill the whole video of {num_frames} frames: nothing is left to make")
    return [Located(span) for span in spans]


def _span(number: int, reference: Reference, spec: LatentSpec, num_frames: int) -> Span:
    if reference.place is None:
        raise UserError(
            f"{reference.name} does not say where in the video it lies: {reference.name}@0 is its beginning, "
            f"{reference.name}@-1 its last frame, CLIP@32-64 the frames 32 to 64"
        )
    first = _counted(reference.place[0], reference, num_frames)
    end = reference.place[1]
    last = None if end is None else _counted(end, reference, num_frames)
    if last is not None and last < first:
        raise UserError(f"{reference.placed_name} ends before it begins")
    if reference.is_picture:
        return _picture(number, reference, first, last, spec, num_frames)
    return _clip(number, reference, first, last, spec, num_frames)


def _counted(frame: int, reference: Reference, num_frames: int) -> int:
    """A frame's number from the beginning."""
    found = frame + num_frames if frame < 0 else frame
    if not 0 <= found < num_frames:
        raise UserError(
            f"{reference.placed_name}: the video has no frame {frame}; its {num_frames} frames are 0 to "
            f"{num_frames - 1}, or -{num_frames} to -1 from the end"
        )
    return found


def _picture(
    number: int, reference: Reference, first: int, last: int | None, spec: LatentSpec, num_frames: int
) -> Span:
    if last not in (None, first):
        raise UserError(f"{reference.placed_name}: a picture gives one frame, such as {reference.name}@{first}")
    places = {*range(0, num_frames, spec.compression[0]), num_frames - 1}  # which is on the grid of a causal one
    _check_place(first, places, reference, "a picture", spec)
    return Span(first // spec.compression[0], number)


def _clip(number: int, reference: Reference, first: int, last: int | None, spec: LatentSpec, num_frames: int) -> Span:
    ratio, lead = spec.compression[0], int(spec.is_causal)
    _check_place(first, set(range(0, num_frames, ratio)), reference, "a clip's beginning", spec)
    if last is None:
        groups = (min(reference.frames, num_frames - first) - lead) // ratio
        last = first + groups * ratio + lead - 1
    _check_place(last, set(range(ratio - 1 + lead, num_frames, ratio)) | {lead - 1}, reference, "a clip's end", spec)
    needed = last - first + 1
    if needed > reference.frames or needed < 1:
        raise UserError(
            f"reference too short: {reference.name} has {reference.frames} frames, {reference.placed_name} needs "
            f"{max(needed, ratio)}"
        )
    return Span(first // ratio, number, (needed - lead) // ratio or None)


def _check_place(frame: int, places: set[int], reference: Reference, what: str, spec: LatentSpec) -> None:
    if frame in places:
        return
    near = [max((p for p in places if p < frame), default=None), min((p for p in places if p > frame), default=None)]
    right = " or ".join(str(place) for place in near if place is not None and place >= 0)
    raise UserError(
        f"{reference.placed_name}: this autoencoder codes {spec.compression[0]} frames together, and {what} cannot lie "
        f"at frame {frame}; use {right}"
    )


def _frames_of(latent: int, spec: LatentSpec) -> str:
    """The frames of a latent, in words."""
    ratio = spec.compression[0]
    if spec.is_causal and latent == 0:
        return "frame 0"
    first = latent * ratio - (ratio - 1) * int(spec.is_causal)
    return f"frames {first} to {first + ratio - 1}"
