"""Interlaced frames made whole ones."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.filter

from opensora.utils.media.decoded import decoded
from opensora.utils.media.kinds import open_clip, video_stream

# FFmpeg's numbers of field orders
BOTTOM_FIRST = (3, 4)
FIELDS = (2, 3, 4, 5)
Stamp = tuple[int | None, Fraction | None]


class _Deinterlacer:
    """FFmpeg's ``bwdif``, a frame for a frame, of frames of one size and format: ``which`` are "all" of them or those
    that are flagged "interlaced"."""

    def __init__(self, template: "av.VideoFrame", time_base: Fraction, parity: str, which: str) -> None:
        self.kind = (template.width, template.height, template.format.name)
        self._stamps: deque[Stamp] = deque()  # the filter counts in a time base of its own
        self._graph = av.filter.Graph()
        self._graph.threads = 1  # loader workers are the parallelism
        width, height, _ = self.kind
        source = self._graph.add_buffer(width=width, height=height, format=template.format, time_base=time_base)
        filters = self._graph.add("bwdif", f"mode=send_frame:parity={parity}:deint={which}")
        self._graph.link_nodes(source, filters, self._graph.add("buffersink")).configure()

    def push(self, frame: "av.VideoFrame | None") -> Iterator["av.VideoFrame"]:
        """Frames that are ready after one more (None: the end)."""
        if frame is not None:
            self._stamps.append((frame.pts, frame.time_base))
        self._graph.vpush(frame)
        while self._stamps:
            try:
                made = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            made.pts, made.time_base = self._stamps.popleft()
            yield made


def progressive(
    container: "av.container.InputContainer", stream: "av.VideoStream", by_header: bool | None = None
) -> Iterator["av.VideoFrame"]:
    """Decoded frames in order, those that are flagged interlaced deinterlaced (as at their first field), the others as
    they are.

    Args:
        container, stream: of which nothing has been decoded yet.
        by_header: deinterlace all frames; see :func:`only_header_says_fields`, which None asks the first frame.
    """
    worker: _Deinterlacer | None = None
    says_fields = header_says_fields(stream)
    for frame in decoded(container, stream):
        if by_header is None:
            by_header = says_fields and not frame.interlaced_frame
        if worker is not None and worker.kind != (frame.width, frame.height, frame.format.name):
            yield from worker.push(None)
            worker = None
        if worker is None and not (by_header or frame.interlaced_frame):
            yield frame
            continue
        which = "all" if by_header else "interlaced"
        worker = worker or _Deinterlacer(frame, stream.time_base or Fraction(1, 1), _parity(stream), which)
        yield from worker.push(frame)
    if worker is not None:
        yield from worker.push(None)


def header_says_fields(stream: "av.VideoStream") -> bool:
    """Whether frames are two fields each by the header of a clip, of which nothing has been decoded yet."""
    return stream.codec_context.field_order in FIELDS


def only_header_says_fields(path: str | Path) -> bool:
    """Whether the frames of a clip are interlaced by its header and not flagged so themselves: by its first one, since
    where there are flags they may say of others that they are whole."""
    with open_clip(path) as container:
        stream = video_stream(container)
        if not header_says_fields(stream):
            return False
        first = next(decoded(container, stream), None)
        return first is not None and not first.interlaced_frame


def _parity(stream: "av.VideoStream") -> str:
    """Which field is shown first, by the header: frames have a flag for it that does not reach the filter."""
    context = stream.codec_context
    return "bff" if context.field_order in BOTTOM_FIRST or context.name == "dvvideo" else "tff"
