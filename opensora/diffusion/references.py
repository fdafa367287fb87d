"""References of a condition: pictures and clips, read from files or the web, checked early, fitted to the video."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from opensora.datasets.transforms import fit_frames
from opensora.diffusion.conditions import Span, get_spans
from opensora.diffusion.plan import LatentSpec
from opensora.utils.download import fetch, is_url
from opensora.utils.errors import UserError
from opensora.utils.media.pictures import as_pixels
from opensora.utils.paths import expand_home
from opensora.utils.video import is_video, read_image, read_video, video_info

Source = str | Path | np.ndarray
"""A picture or video file, or pixels: uint8 [H, W, 3] or [T, H, W, 3]. Pipelines take whatever else
:func:`opensora.utils.media.pictures.as_pixels` does, and make it one of these."""

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
            name = hashlib.sha256(part.encode()).hexdigest()[:16]
            found.append(str(fetch(part, folder, name=name)))
            continue
        path = expand_home(part)
        is_beside = beside is not None and not path.exists() and (beside / path).exists()
        found.append(str(beside / path) if beside is not None and is_beside else str(path))
    return found


def check_references(sources: Sequence[Source], cond_type: str, spec: LatentSpec) -> None:
    """See that the references of one sample can be read and are long enough, without reading clips whole.

    Raises:
        UserError: missing, unreadable or too short; names the file, and the frames needed and found.
    """
    for span in get_spans(cond_type):
        source = sources[span.reference]
        needed = span.pixel_frames(spec.is_causal, spec.compression[0])
        if isinstance(source, np.ndarray):
            found = 1 if source.ndim == 3 else len(source)
        elif is_video(source):
            found = video_info(source).num_frames
        else:
            read_image(source)
            found = 1
        _check_length(source, cond_type, needed, found)


def _check_length(source: Source, cond_type: str, needed: int, found: int) -> None:
    if found < needed:
        name = "the given frames" if isinstance(source, np.ndarray) else str(source)
        raise UserError(f"reference too short: {name} has {found} frames, {cond_type} needs {needed}")


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
        source = sources[span.reference]
        frames, picture = _read(source, span, needed)
        _check_length(source, cond_type, needed, len(frames))
        clips.append(fit_frames(frames, height, width, picture))
    return clips


def _read(source: Source, span: Span, count: int) -> tuple[np.ndarray, bool]:
    """At most ``count`` frames uint8 [T, H, W, 3] from the end of the source that the run lies at, and whether it is a
    picture."""
    if isinstance(source, np.ndarray):
        frames, picture = (source[None], True) if source.ndim == 3 else (source, False)
        return frames[:count] if span.at == "head" else frames[max(len(frames) - count, 0) :], picture
    if is_video(source):
        return read_video(source, max_frames=count, from_end=span.at == "tail")[0], False
    return read_image(source)[None], True


def per_prompt_references(
    ref: References | Sequence[References | None] | None, count: int, downloads: Path
) -> list[list[Source] | None]:
    """The ``ref`` argument of a pipeline as a list of local sources (or None) per prompt; pixels as uint8.

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
    return [_local_sources(item, downloads, number) or None for number, item in enumerate(per_prompt, 1)]


def _local_sources(item: Any, downloads: Path, prompt: int) -> list[Source]:
    parts = list(item) if isinstance(item, list | tuple) else [] if item is None else [item]
    sources: list[Source] = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str | Path):
            sources += locate_references(str(part), downloads)
        else:
            sources.append(as_pixels(part, f"reference {number} of prompt {prompt}"))
    return sources
