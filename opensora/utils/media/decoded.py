"""Frames of a clip, decoded, with what the file around them says of them."""

from collections.abc import Callable, Iterator
from typing import Any

import av
import av.codec

UNNAMED = 2  # FFmpeg's (ISO/IEC 23091-2) "unspecified", of primaries, transfer function and matrix
UNNAMED_RANGE = 0
ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that read the transparency which FFmpeg's own leave out


class Decoder:
    """Decodes packets of one stream.

    Decoders of ProRes, HEVC and AV1 put "unspecified" over the colours that the header of a file names, where frames
    have no names of their own. Files whose names were set by an editor or a multiplexer are like that, and players take
    the file's: such frames get its names.

    Args:
        stream: of which nothing has been decoded yet.
    """

    def __init__(self, stream: "av.VideoStream") -> None:
        context: Any = stream.codec_context
        self._names = {key: int(getattr(context, key)) for key in ("color_primaries", "color_trc", "colorspace")}
        self._range = int(context.color_range)
        self.context: Any = _with_alpha(stream) or context

    def __call__(self, packet: "av.Packet") -> Iterator["av.VideoFrame"]:
        """Frames that a packet brings out."""
        return map(self.complete, self.context.decode(packet))

    def complete(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        """Give a frame the names that it lacks; returns it."""
        for key, name in self._names.items():
            if name != UNNAMED and int(getattr(frame, key)) == UNNAMED:
                setattr(frame, key, name)
        if self._range != UNNAMED_RANGE and int(frame.color_range) == UNNAMED_RANGE:
            frame.color_range = self._range
        return frame


def _with_alpha(stream: "av.VideoStream") -> "av.CodecContext | None":
    """A decoder for the transparency of WebM, None where there is none."""
    name = ALPHA.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1" or name not in av.codec.codecs_available:
        return None
    return av.CodecContext.create(name, "r")


def decoded(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    before: Callable[[Any, "av.Packet"], None] = lambda context, packet: None,
) -> Iterator["av.VideoFrame"]:
    """Frames in order, from where the container is.

    Args:
        container, stream: of which nothing has been decoded yet.
        before: is called with the decoder's context before each packet.
    """
    decoder = Decoder(stream)
    for packet in container.demux(stream):
        before(decoder.context, packet)
        yield from decoder(packet)
