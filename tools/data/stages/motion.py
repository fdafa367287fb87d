"""How much moves: the VMAF motion feature, optical flow, camera motion, and how sharp it all is."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl

from opensora.config.options import Options, opt
from tools.data.engine.stage import LARGEST_SIDE, SMALLEST_SIDE, Analyser, ClipInfo, Picture, PixelStage, Row

# libvmaf's 5-tap Gaussian, in 1/65536 (libvmaf/src/feature/integer_motion.h)
VMAF_FILTER = np.array([3571, 16004, 26386, 16004, 3571], np.float64) / 65536
CELLS, SHARPEST = 6, 90  # along the short side of a picture; percentile of them that is its sharpness
FIXED_POINT = 64  # levels of a blurred difference per level of brightness: 16 bits hold them, and are fast


class Clock:
    """Says which frames to look at so that there are at most ``rate`` per second, evenly spread."""

    def __init__(self, rate: float, fps: float) -> None:
        self.step = max(1.0 / rate, 1.0 / fps if fps else 0.0)
        self.slack = 0.25 / fps if fps else 0.0
        self.next = 0.0

    def due(self, time: float) -> bool:
        """Whether to look at the frame at this time; answers for each frame once, in order."""
        if time + self.slack < self.next:
            return False
        self.next += self.step * max(math.floor((time + self.slack - self.next) / self.step) + 1, 1)
        return True


# ---------------------------------------------------------------------------------------------------------------- VMAF


@dataclass(frozen=True, kw_only=True)
class MotionOptions(Options):
    """The VMAF motion feature, which training appends as 'motion score'."""

    fps: float = opt(24.0, "frames are compared at this rate", "frames/s", above=0, most=1e3)


class Motion(PixelStage):
    """The motion score of Open-Sora 2.0: mean of VMAF's motion and motion2 over the frames, 0 for a still.

    Motion is the mean absolute difference between the blurred brightness of neighbouring frames at full size; motion2
    of a frame is the smaller of its own and the next one's, so that a single jump does not count.
    """

    settings: MotionOptions

    name = "motion"
    adds: ClassVar = {"score_vmafmotion": pl.Float64}

    def analyser(self, row: Row, info: ClipInfo) -> Analyser:
        """Motion of one clip."""
        return MotionAnalyser(self.settings.fps, info.fps)


class MotionAnalyser(Analyser):
    """See ``Motion``.

    Args:
        rate: frames per second that are compared. A slower clip counts as if its frames were shown repeatedly.
        fps: of the clip.
    """

    def __init__(self, rate: float, fps: float) -> None:
        self.fps = fps
        self.clock = Clock(rate, fps)
        self.repeats = rate / fps if fps and fps < rate else 1.0
        self.before: np.ndarray | None = None
        self.difference, self.blurred = np.empty((2, 0, 0), np.int16)  # one frame's worth, used again for every frame
        self.scores: list[float] = []

    def add(self, index: int, time: float, frame: Picture) -> None:
        """Compare with the frame before."""
        if not self.clock.due(time):
            return
        luma = np.ascontiguousarray(frame.luma)
        if self.before is None:
            self.scores.append(0.0)
        else:
            if self.difference.shape != luma.shape:
                self.difference, self.blurred = np.empty((2, *luma.shape), np.int16)
            # The filter is linear: blurring the difference once does for blurring both frames.
            np.subtract(luma, self.before, out=self.difference, dtype=np.int16)
            fixed = VMAF_FILTER * FIXED_POINT
            cv2.sepFilter2D(self.difference, cv2.CV_16S, fixed, VMAF_FILTER, dst=self.blurred)
            self.scores.append(cv2.norm(self.blurred, cv2.NORM_L1) / luma.size / FIXED_POINT)
        self.before = luma  # the array keeps the decoder's frame alive

    def result(self) -> Row:
        """``score_vmafmotion``; None for a picture."""
        if not self.fps:
            return {"score_vmafmotion": None}
        motion = np.asarray(self.scores or [0.0])
        motion2 = np.minimum(motion, np.append(motion[1:], motion[-1]))
        if self.repeats > 1:
            motion2 = np.zeros_like(motion2)  # next to every step there is a repeated frame
        return {"score_vmafmotion": float((motion.mean() + motion2.mean()) / 2 / self.repeats)}


# ------------------------------------------------------------------------------------------------------------ flow


@dataclass(frozen=True, kw_only=True)
class FlowOptions(Options):
    """Optical flow (DIS)."""

    pairs_per_second: float = opt(2.0, "pairs of neighbouring frames looked at", above=0, most=1e3)
    side: int = opt(
        320, "long side for the flow; that of camera costs least", "px", least=SMALLEST_SIDE, most=LARGEST_SIDE
    )


class Flow(PixelStage):
    """Mean length of the optical flow (Dense Inverse Search, Kroeger et al. 2016), in frame widths per second."""

    settings: FlowOptions

    name = "flow"
    adds: ClassVar = {"flow": pl.Float64}

    def analyser(self, row: Row, info: ClipInfo) -> Analyser:
        """Flow of one clip."""
        return FlowAnalyser(self.settings, info)


class FlowAnalyser(Analyser):
    """Pairs of neighbouring frames, a few per second."""

    def __init__(self, settings: FlowOptions, info: ClipInfo) -> None:
        self.clock = Clock(settings.pairs_per_second, info.fps)
        self.side = settings.side
        opencv: Any = cv2  # its type stubs lack this class
        self.dis = opencv.DISOpticalFlow_create(opencv.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self.first: tuple[float, np.ndarray] | None = None
        self.speeds: list[float] = []

    def add(self, index: int, time: float, frame: Picture) -> None:
        """Either begin or end a pair."""
        if self.first is not None:
            start, image = self.first
            self.first = None
            small = frame.small(self.side)
            flow = self.dis.calc(image, small, None)
            length = float(np.sqrt(np.square(flow).sum(axis=2)).mean())
            self.speeds.append(length / small.shape[1] / (time - start))
        if self.clock.due(time):
            self.first = (time, frame.small(self.side))

    def result(self) -> Row:
        """``flow``; None for a picture."""
        return {"flow": float(np.mean(self.speeds)) if self.speeds else None}


# ------------------------------------------------------------------------------------------------------------ blur


@dataclass(frozen=True, kw_only=True)
class BlurOptions(Options):
    """Sharpness: energy of the Laplacian against contrast."""

    frames: int = opt(5, "frames looked at", least=1, most=1000)
    side: int = opt(720, "long side it is measured at", "px", least=SMALLEST_SIDE, most=LARGEST_SIDE)


class Blur(PixelStage):
    """Sharpness: energy of the Laplacian (Pech-Pacheco et al. 2000), median of some frames. Low is blurred.

    It is that of the sharpest tenth of the picture, so that a sharp subject before a soft background does not count as
    blurred, divided by the variance of the whole, so that a sharp clip of low contrast does not either.
    """

    settings: BlurOptions

    name = "blur"
    version = 2
    adds: ClassVar = {"sharpness": pl.Float64}

    def analyser(self, row: Row, info: ClipInfo) -> Analyser:
        """Sharpness of one clip."""
        return BlurAnalyser(self.settings, info)


def middles(count: int, frames: int) -> list[int]:
    """Frame numbers at the middle of ``count`` equal parts of a clip; each once."""
    return sorted({int((part + 0.5) * max(frames, 1) / count) for part in range(count)})


class BlurAnalyser(Analyser):
    """See ``Blur``."""

    def __init__(self, settings: BlurOptions, info: ClipInfo) -> None:
        self.side = settings.side
        self.wanted = set(middles(settings.frames, info.num_frames))
        self.values: dict[int, float] = {}

    def add(self, index: int, time: float, frame: Picture) -> None:
        """Look at the frame if it is one of the chosen."""
        if index in self.wanted or index == 0:
            self.values[index] = sharpness(frame.small(self.side))

    def result(self) -> Row:
        """``sharpness``; of the first frame only if the header's number of frames was too high for any other."""
        chosen = [value for index, value in self.values.items() if index in self.wanted]
        return {"sharpness": float(np.median(chosen or list(self.values.values())))}


def sharpness(image: np.ndarray) -> float:
    """Sharpness of a picture (uint8 [H, W]); see ``Blur``."""
    # a little smoothing first: the blocks and ringing of strong compression are not detail
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.0)
    energy = np.square(cv2.Laplacian(smooth, cv2.CV_32F))
    height, width = image.shape
    cell = max(min(height, width) / CELLS, 1)
    cells = cv2.resize(energy, (round(width / cell), round(height / cell)), interpolation=cv2.INTER_AREA)  # their means
    return 1000 * float(np.percentile(cells, SHARPEST)) / max(float(smooth.std()) ** 2, 1.0)
