"""References of a condition: pictures and clips, read from files or the web, checked early, fitted to the video."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from opensora.datasets.transforms import fit_frames
from opensora.diffusion.conditions import get_condition, get_spans, takes_references
from opensora.diffusion.free import FreeCondition, Region, filled, kept_cells
from opensora.diffusion.placing import Located, Reference
from opensora.diffusion.plan import LatentSpec, SamplePlan
from opensora.diffusion.spans import Span
from opensora.utils.download import fetch, is_url
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.media.pictures import as_pixels
from opensora.utils.paths import expand_home, is_there, split_place
from opensora.utils.video import is_video, read_image, read_video, video_info

logger = get_logger(__name__)

Media = str | Path | np.ndarray
"""A picture or video file, or pixels: uint8 [H, W, 3] or [T, H, W, 3]. Pipelines take whatever else
:func:`opensora.utils.media.pictures.as_pixels` does, and make it one of these."""


@dataclass(frozen=True)
class Placed:
    """A picture or clip and the frames of the video that it gives (``cond_type="frames"``); in a text, ``a.png@64`` or
    ``b.mp4@96-128``.

    Attributes:
        media: the picture or clip.
        first: number of its first frame in the video, from 0; negative from the end.
        last: of its last one; None for a picture, and for as much of a clip as there is and fits.
    """

    media: Media
    first: int
    last: int | None = None


Source = Media | Placed
"""A picture or clip, maybe with its place."""

References = Source | Sequence[Source]
"""References of one sample."""


def split_references(ref: str) -> list[str]:
    """Paths of a ``ref`` value, which may hold several separated by ``;``."""
    return [part.strip() for part in ref.split(";") if part.strip()]


def locate_references(ref: str, folder: Path, beside: Path | None = None) -> list[str]:
    """Make every path of a ``ref`` value local.

    Args:
        ref: paths (``~`` is the home folder) or http(s) addresses, separated by ``;``.
        folder: where downloads go.
        beside: folder of the table that names them; tried for relative paths that are not in the working folder.

    Raises:
        UserError: a download failed.
    """
    found = []
    for part in split_references(ref):
        if is_url(part):
            address, place = split_place(part)
            name = hashlib.sha256(address.encode()).hexdigest()[:16]
            found.append(_with_place(str(fetch(address, folder, name=name)), place))
            continue
        path, place = expand_home(part), ""
        if not is_there(path) and (beside is None or not is_there(beside / path)):
            bare, place = split_place(part)
            path = expand_home(bare)
        is_beside = beside is not None and not is_there(path) and is_there(beside / path)
        found.append(_with_place(str(beside / path) if beside is not None and is_beside else str(path), place))
    return found


def _with_place(path: str, place: str) -> str:
    return f"{path}@{place}" if place else path


def media_of(source: Source) -> Media:
    """A reference without its place."""
    if isinstance(source, Placed):
        return source.media
    return split_place(source)[0] if isinstance(source, str) else source


def _place_of(source: Source) -> tuple[int, int | None] | None:
    if isinstance(source, Placed):
        return source.first, source.last
    place = split_place(source)[1] if isinstance(source, str) else ""
    if not place:
        return None
    first, dash, last = place[1:].partition("-")  # behind a sign that the first number may have
    return int(place[0] + first), int(last) if dash else None


def check_references(
    sources: Sequence[Source], cond_type: str, spec: LatentSpec, plan: SamplePlan | None = None
) -> None:
    """See that the references of one sample can be read and are long enough, without reading clips whole.

    Args:
        sources: of the sample.
        cond_type: what they fix.
        spec: of the autoencoder.
        plan: of the video that they lie in, for conditions that give anything anywhere.

    Raises:
        UserError: missing, unreadable, too short or in the wrong place; names the file, and the frames needed and
            found.
    """
    condition = get_condition(cond_type)
    if isinstance(condition, FreeCondition):
        assert plan is not None, cond_type
        known = [_known(source) for source in sources[:1]]
        for source in sources[1:]:
            with _of_mask(condition):
                known.append(_known(source))
        condition.locate(known, spec, plan.length, plan.num_frames)
        if isinstance(condition, Region):
            _check_mask(sources, spec)
        return
    for span in condition:
        source = _unplaced(sources[span.reference], cond_type)
        needed = span.pixel_frames(spec.is_causal, spec.compression[0])
        _check_length(source, cond_type, needed, _length(source)[0])


@contextmanager
def _of_mask(condition: FreeCondition) -> Iterator[None]:
    """Says of what goes wrong with the second reference of a region that it is the mask."""
    try:
        yield
    except UserError as error:
        raise UserError(f"mask: {error}" if isinstance(condition, Region) else str(error)) from None


def given_frames(sources: Sequence[Source], plan: SamplePlan) -> list[tuple[str, int, int]]:
    """Name, first and last frame of the video of what each reference gives, for conditions that give anything anywhere;
    empty for the others."""
    condition, spec = get_condition(plan.cond_type), plan.spec
    if not isinstance(condition, FreeCondition) or not sources:
        return []
    known, found = [_known(source) for source in sources], []
    for each in condition.locate(known, spec, plan.length, plan.num_frames):
        place = each.span.pixel_run(spec.is_causal, spec.compression[0]).place(plan.length)
        found.append((known[each.span.reference].name, place.start, place.stop - 1))
    return found


def _unplaced(source: Source, cond_type: str) -> Media:
    if _place_of(source) is not None and get_spans(cond_type):
        raise UserError(f"{_known(source).placed_name}: a place in the video is for cond_type frames, not {cond_type}")
    return media_of(source)


def _length(media: Media) -> tuple[int, bool]:
    """Frames of a picture or clip, and whether it is a picture."""
    if isinstance(media, np.ndarray):
        return (1, True) if media.ndim == 3 else (len(media), False)
    if is_video(media):
        return video_info(media).num_frames, False
    read_image(media)
    return 1, True


def _known(source: Source) -> Reference:
    media = media_of(source)
    frames, is_picture = _length(media)
    return Reference(_name(media), frames, is_picture, _place_of(source))


def _name(media: Media) -> str:
    return "the given frames" if isinstance(media, np.ndarray) else str(media)


def _check_length(source: Media, cond_type: str, needed: int, found: int) -> None:
    if found < needed:
        raise UserError(f"reference too short: {_name(source)} has {found} frames, {cond_type} needs {needed}")


def read_clips(sources: Sequence[Source], cond_type: str, spec: LatentSpec, height: int, width: int) -> list[Tensor]:
    """Pixels of one sample's references, one clip per given run of the condition.

    Returns:
        Clips [3, T, height, width] in [-1, 1], scaled to cover the frame and cut in the centre: frames of clips as in
        training on clips, also where only one is taken, and pictures as in training on pictures.

    Raises:
        UserError: as :func:`check_references`.
    """
    clips = []
    for span in get_spans(cond_type):
        needed = span.pixel_frames(spec.is_causal, spec.compression[0])
        source = _unplaced(sources[span.reference], cond_type)
        frames, picture = _read(source, span.at == "tail", needed)
        _check_length(source, cond_type, needed, len(frames))
        clips.append(fit_frames(frames, height, width, picture))
    return clips


def _read(source: Media, from_end: bool, count: int) -> tuple[np.ndarray, bool]:
    """At most ``count`` frames uint8 [T, H, W, 3] from one end of the source, and whether it is a picture."""
    if isinstance(source, np.ndarray):
        frames, picture = (source[None], True) if source.ndim == 3 else (source, False)
        return frames[max(len(frames) - count, 0) :] if from_end else frames[:count], picture
    if is_video(source):
        return read_video(source, max_frames=count, from_end=from_end)[0], False
    return read_image(source)[None], True


@dataclass(frozen=True)
class PlacedClips:
    """Pixels of one sample's references, and where they lie.

    Attributes:
        spans: of each.
        clips: each [3, T, height, width] in [-1, 1].
        cells, whole: as of :class:`opensora.diffusion.free.PlacedLatents`; ``whole`` in pixels.
    """

    spans: tuple[Span, ...]
    clips: list[Tensor]
    cells: Tensor | None = None
    whole: Tensor | None = None


def read_placed(sources: Sequence[Source], plan: SamplePlan) -> PlacedClips:
    """Pixels of one sample's references of a condition of which each sample says what it gives.

    Raises:
        UserError: as :func:`check_references`.
    """
    condition, spec = get_condition(plan.cond_type), plan.spec
    assert isinstance(condition, FreeCondition), plan.cond_type
    found = condition.locate([_known(source) for source in sources], spec, plan.length, plan.num_frames)
    clips = [_cut(media_of(sources[each.span.reference]), each, spec, plan.height, plan.width) for each in found]
    spans = tuple(each.span for each in found)
    if not isinstance(condition, Region):
        return PlacedClips(spans, clips)
    kept = _read_mask(sources, plan.num_frames, plan.height, plan.width)
    return PlacedClips(spans, [filled(clips[0], kept)], kept_cells(kept, spec), clips[0])


def _cut(media: Media, located: Located, spec: LatentSpec, height: int, width: int) -> Tensor:
    """The frames of a run; a picture stands still through it."""
    needed = located.span.pixel_frames(spec.is_causal, spec.compression[0])
    frames, picture = _read(media, located.end == "tail", needed)
    clip = fit_frames(frames, height, width, picture)
    return clip.expand(-1, needed, -1, -1) if picture else clip


def _read_mask(sources: Sequence[Source], num_frames: int, height: int, width: int) -> Tensor:
    """Which pixels are kept, bool [1 or num_frames, height, width]: white ones, cut as the reference is."""
    media, mask = (media_of(source) for source in sources)
    first, picture = _read(media, False, 1)
    frames, _ = _read(mask, False, num_frames)
    (rows, columns), (mask_rows, mask_columns) = first.shape[1:3], frames.shape[1:3]
    if abs(mask_rows * columns - mask_columns * rows) > 0.02 * rows * mask_columns:
        raise UserError(
            f"mask {_name(mask)} is {mask_columns} x {mask_rows} pixels, {_name(media)} {columns} x {rows}: draw the "
            "mask on a frame of the reference, so that it is cut in the same way"
        )
    return fit_frames(frames, height, width, picture).mean(0) > 0


def _check_mask(sources: Sequence[Source], spec: LatentSpec) -> None:
    """Refuse a mask that cannot be one, by its first frame."""
    media, mask = (media_of(source) for source in sources)
    ratio = spec.compression
    rows, columns = _read(media, False, 1)[0].shape[1:3]
    height, width = max(rows // ratio[1], 1) * ratio[1], max(columns // ratio[2], 1) * ratio[2]
    kept = _read_mask(sources, 1, height, width)
    if kept.all() or not kept.any():
        raise UserError(
            f"mask {_name(mask)} is all {'white' if kept.all() else 'black'}: what is white is kept from the "
            "reference, what is black is made; it needs both"
        )


def per_prompt_references(
    ref: References | Sequence[References | None] | None, count: int, downloads: Path
) -> list[list[Source] | None]:
    """The ``ref`` argument of a pipeline as a list of local sources per prompt (pixels as uint8): None where none is
    given, empty where what is given names nothing.

    Raises:
        UserError: as many references as prompts are needed, a download failed, or a thing that is no reference.
    """
    if ref is None:
        return [None] * count
    is_batch = isinstance(ref, Sequence) and not isinstance(ref, str) and count > 1
    given: Any = ref
    per_prompt: list[Any] = list(given) if is_batch else [given] * count
    if len(per_prompt) != count:
        raise UserError(f"{len(per_prompt)} references for {count} prompts; give one (or None) per prompt")
    return [
        None if item is None else _local_sources(item, downloads, number) for number, item in enumerate(per_prompt, 1)
    ]


def warn_of_unused(sources: Sequence[object], cond_type: str, where: str) -> None:
    """Say how many references of one sample a condition has no use for."""
    spans = get_spans(cond_type)
    used = {span.reference % len(sources) for span in spans} if sources else set()
    if spans and len(used) < len(sources):
        count = len(sources)
        logger.warning("%s: cond_type %s uses %d of the %d references", where, cond_type, len(used), count)


def check_given(sources: Sequence[Sequence[Source] | None], cond_type: str, needed: bool) -> None:
    """See that references which are given name something, and say so where a condition gets none at all.

    Args:
        sources: per prompt, of :func:`per_prompt_references`.
        cond_type: what they fix.
        needed: no picture is made first to stand in for them.

    Raises:
        UserError: an empty reference, of a condition that takes some.
    """
    if not takes_references(cond_type):
        return
    for number, of_prompt in enumerate(sources, 1):
        warn_of_unused(of_prompt or (), cond_type, f"prompt {number}")
        if of_prompt is not None and not of_prompt:
            raise UserError(
                f"ref of prompt {number} is empty: cond_type {cond_type} takes a picture or clip; None makes a video "
                "of the text alone"
            )
    if needed and not any(sources):
        logger.warning("no reference for cond_type %s, making a t2v video", cond_type)


def _local_sources(item: Any, downloads: Path, prompt: int) -> list[Source]:
    parts = list(item) if isinstance(item, list | tuple) else [] if item is None else [item]
    sources: list[Source] = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str | Path):
            sources += locate_references(str(part), downloads)
        elif isinstance(part, Placed):
            (media,) = _local_sources(part.media, downloads, prompt)
            sources.append(Placed(media_of(media), part.first, part.last))
        else:
            sources.append(as_pixels(part, f"reference {number} of prompt {prompt}"))
    return sources
