"""Interlaced frames made whole ones."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import av
import av.filter

from opensora.utils.media.decoded import decoded

BOTTOM_FIRST = (3, 4)  # FFmpeg's numbers of field orders
Stamp = tuple[int | None, Fraction | None]


class _Deinterlacer:
    """FFmpeg's ``bwdif``, a frame for a frame, of frames of one size and format."""

    def __init__(self, template: "av.VideoFrame", time_base: Fraction, parity: str) -> None:
        self.kind = (template.width, template.height, template.format.name)
        self._stamps: deque[Stamp] = deque()  # the filter counts in a time base of its own
        self._graph = av.filter.Graph()
        self._graph.threads = 1  # loader workers are the parallelism
        width, height, _ = self.kind
        source = self._graph.add_buffer(width=width, height=height, format=template.format, time_base=time_base)
        filters = self._graph.add("bwdif", f"mode=send_frame:parity={parity}:deint=interlaced")
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


def progressive(container: "av.container.InputContainer", stream: "av.VideoStream") -> Iterator["av.VideoFrame"]:
    """Decoded frames in order, those that are flagged interlaced deinterlaced (as at their first field), the others as
    they are."""
    worker: _Deinterlacer | None = None
    for frame in decoded(container, stream):
        if worker is not None and worker.kind != (frame.width, frame.height, frame.format.name):
            yield from worker.push(None)
            worker = None
        if worker is None and not frame.interlaced_frame:
            yield frame
            continue
        worker = worker or _Deinterlacer(frame, stream.time_base or Fraction(1, 1), _parity(stream))
        yield from worker.push(frame)
    if worker is not None:
        yield from worker.push(None)


def _parity(stream: "av.VideoStream") -> str:
    """Which field is shown first, by the header: frames have a flag for it that does not reach the filter."""
    context = stream.codec_context
    return "bff" if context.field_order in BOTTOM_FIRST or context.name == "dvvideo" else "tff"
