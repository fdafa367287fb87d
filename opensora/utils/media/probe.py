"""What a clip or picture is: length, size and rate as a reader finds them, and what to know before it is used."""

import math
from dataclasses import dataclass
from pathlib import Path

import av

from opensora.utils.errors import UserError
from opensora.utils.media import hdr
from opensora.utils.media.decoded import decoded
from opensora.utils.media.fields import header_says_fields
from opensora.utils.media.frames import LENGTH_SLACK, is_constant, is_ordered, is_timed
from opensora.utils.media.kinds import DECODE_ERRORS, Kind, decoding, is_picture, open_clip, open_picture, video_stream
from opensora.utils.media.pictures import is_lying
from opensora.utils.media.pixels import plan_for
from opensora.utils.media.timing import Timeline, mean_rate, scan, timeline
from opensora.utils.paths import is_file

HIDDEN_FRAMES = ("vp8",)  # codecs with packets that are decoded and not shown


@dataclass(frozen=True)
class MediaInfo:
    """What a reader makes of a file.

    Args:
        kind: picture or clip.
        num_frames: that are decoded; 1 for a picture.
        height, width: pixels, upright and square.
        fps: frames per second, the mean where the rate varies; NaN for a picture.
        codec: FFmpeg's name, or Pillow's of a picture's format.
        variable_rate: frames are shown for different times, so that reading goes by time.
        interlaced: frames are stored as two fields, which reading makes whole.
        hdr: "PQ" or "HLG" for high dynamic range, which reading maps to the standard one.
    """

    kind: Kind
    num_frames: int
    height: int
    width: int
    fps: float
    codec: str
    variable_rate: bool = False
    interlaced: bool = False
    hdr: str | None = None


def probe(path: str | Path) -> MediaInfo:
    """Look into a file.

    A clip's first frame is decoded to see that the codec works and how large frames really are. Frames are counted only
    where the header leaves them out, contradicts itself, or promises more than the file holds: by packets in containers
    that say when each is shown, by decoding in others.

    Raises:
        UserError: missing or unreadable; the message says why.
    """
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    if is_picture(path):
        return _probe_picture(path)
    with decoding(path):
        return _probe_clip(path)


def _probe_picture(path: str | Path) -> MediaInfo:
    with open_picture(path) as image:
        (width, height), name = image.size, str(image.format)
        image.verify()
    if is_lying(path, name):
        width, height = height, width
    return MediaInfo("picture", 1, height, width, math.nan, name)


def _probe_clip(path: str | Path) -> MediaInfo:
    with open_clip(path) as container:
        stream = video_stream(container)
        stream.thread_type = "NONE"
        interlaced = header_says_fields(stream)
        first = next(decoded(container, stream), None)
        if first is None:
            raise UserError(f"{path}: not one frame can be decoded")
        plan = plan_for(first, float(stream.sample_aspect_ratio or 1))
        count, times = _count(path, container, stream)
        is_variable = times is not None and not times.is_constant
        rate = mean_rate(stream, times)
        codec = stream.codec_context.name
    if count < 1 or rate <= 0:
        raise UserError(f"{path}: {count} frames at {rate:g} frames per second")
    height, width = plan.upright.size(plan.height, plan.width)
    name = hdr.range_name(plan.transfer)
    return MediaInfo(
        "clip",
        count,
        height,
        width,
        round(rate, 3),
        codec,
        is_variable,
        interlaced or bool(first.interlaced_frame),
        name,
    )


def _count(
    path: str | Path, container: "av.container.InputContainer", stream: "av.VideoStream"
) -> tuple[int, Timeline | None]:
    """Number of frames, and their times unless the header can be believed."""
    if is_timed(container) and is_constant(container) and _header_holds(container, stream):
        return stream.frames, None
    by_packets = is_timed(container) and stream.codec_context.name not in HIDDEN_FRAMES
    with open_clip(path) as other:
        times = scan(other) if by_packets else _decode_all(other)
        ordered = is_ordered(other)
    if times is None or isinstance(times, int):
        return times or 0, None
    return len(times.stamps), None if ordered else times


def _decode_all(container: "av.container.InputContainer") -> Timeline | int:
    """Times of all frames that can be decoded, or their number where they have no times."""
    spans: list[tuple[int, int] | None] = []
    stream = video_stream(container)
    stream.thread_type = "AUTO"
    try:
        for frame in container.decode(stream):
            spans.append(None if frame.pts is None else (frame.pts, frame.duration or 0))
    except DECODE_ERRORS:
        pass
    known = [span for span in spans if span is not None]
    return timeline(known) if known and len(known) == len(spans) else len(spans)


def _header_holds(container: "av.container.InputContainer", stream: "av.VideoStream") -> bool:
    """Whether the header's number of frames agrees with its duration and with where the packets end."""
    rate = mean_rate(stream, None)
    if not stream.frames or not stream.duration or not stream.time_base or rate <= 0:
        return False
    per_frame = 1 / (rate * float(stream.time_base))
    if abs(stream.duration / per_frame - stream.frames) > LENGTH_SLACK:
        return False
    end = (stream.start_time or 0) + stream.duration
    try:
        container.seek(end, stream=stream, backward=True)
        ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None and p.size]
    except DECODE_ERRORS:
        return False  # the file ends before its header says: the packets that are there get counted
    return end - max(ends, default=0) < LENGTH_SLACK * per_frame
