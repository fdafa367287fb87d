"""Decoded frames as the pixels that a player shows: upright, square, 8-bit RGB of BT.709."""

from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from opensora.utils.errors import UserError
from opensora.utils.media import hdr
from opensora.utils.media.orientation import Orientation, orientation_of

OnHdr = Literal["map", "refuse"]
"""What happens to clips of high dynamic range: they are tone-mapped, or refused with a UserError."""

# FFmpeg's (ISO/IEC 23091-2) numbers of matrices
BT709 = 1
HONOURED = (1, 4, 5, 6, 7, 9)  # by swscale
BT2020_CONSTANT = 10
NOT_SUPPORTED = {8: "YCgCo", 14: "ICtCp", 15: "IPT-C2"}


@dataclass(frozen=True)
class _Plan:
    """How the frames of a clip are treated, by what its first one says."""

    width: int
    height: int
    pixels: str
    matrix: Colorspace | None
    interpolation: Interpolation | None
    upright: Orientation
    transfer: int = 1
    primaries: int = 1


class FrameConverter:
    """Frames of one clip to uint8 RGB ``[H, W, 3]``, all of the size that the first one has when it is shown.

    The matrix and range that the frames name are honoured; without a name it is BT.709 for high definition and BT.601
    below, as in players, and the limited range. Transparency is laid on white.

    Args:
        aspect: width of a pixel by its height, where the clip says that they are not square.
        on_hdr: see :data:`OnHdr`.
    """

    def __init__(self, aspect: float | None = None, on_hdr: OnHdr = "map") -> None:
        self._aspect, self._on_hdr = aspect, on_hdr
        self._reformatter = VideoReformatter()
        self._plan: _Plan | None = None

    def __call__(self, frame: "av.VideoFrame") -> NDArray[np.uint8]:
        """The pixels of a frame, perhaps a view.

        Raises:
            UserError: HDR that is to be refused, or a colour matrix that is not supported.
        """
        if self._plan is None:
            self._plan = plan_for(frame, self._aspect)
            name = hdr.range_name(self._plan.transfer)
            if name and self._on_hdr == "refuse":
                raise UserError(f"high dynamic range ({name})")
        plan = self._plan
        made = self._reformatter.reformat(
            frame,
            width=plan.width,
            height=plan.height,
            format=plan.pixels,
            src_colorspace=plan.matrix,
            interpolation=plan.interpolation,
            threads=1,  # more cost twice the time that they save
        ).to_ndarray()
        return plan.upright.apply(_finish(made, plan))


def plan_for(frame: "av.VideoFrame", aspect: float | None = None) -> _Plan:
    """How frames like this one are converted; see :class:`FrameConverter`."""
    width = max(round(frame.width * aspect), 1) if aspect else frame.width
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    mapped = hdr.needs_mapping(transfer, primaries)
    return _Plan(
        width,
        frame.height,
        "rgb48le" if mapped else "rgba" if has_alpha(frame) else "rgb24",
        _matrix(frame, mapped),
        Interpolation.BICUBIC if width != frame.width else None,
        orientation_of(frame),
        transfer if mapped else 1,
        primaries if mapped else 1,
    )


def _finish(pixels: NDArray[Any], plan: _Plan) -> NDArray[np.uint8]:
    if plan.pixels == "rgb48le":
        return hdr.to_sdr(pixels.astype(np.uint16, copy=False), plan.transfer, plan.primaries)
    return on_white(pixels) if plan.pixels == "rgba" else pixels.astype(np.uint8, copy=False)


def _matrix(frame: "av.VideoFrame", wide: bool) -> Colorspace | None:
    """The matrix to be told to the converter, None where that of the frame is right."""
    tag = int(frame.colorspace)
    if frame.format.is_rgb or tag in HONOURED:
        return None
    if tag in NOT_SUPPORTED:
        raise UserError(f"the colour matrix {NOT_SUPPORTED[tag]} is not supported; convert it to BT.709")
    if tag == BT2020_CONSTANT or wide:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else None


def has_alpha(frame: "av.VideoFrame") -> bool:
    """Whether parts of a frame may be transparent."""
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``[..., 4]`` laid on white: ``[..., 3]``."""
    if rgba[..., 3].min(initial=255) == 255:
        return rgba[..., :3]
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_bt709(frame: "av.VideoFrame", reformatter: VideoReformatter) -> "av.VideoFrame":
    """An RGB frame as yuv420p in the limited range of BT.709, for writing."""
    return reformatter.reformat(
        frame,
        format="yuv420p",
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )


def tag_bt709(context: "av.VideoCodecContext") -> None:
    """Let a file say that its frames are as :func:`to_bt709` makes them."""
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = ColorRange.MPEG
