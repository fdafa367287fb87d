"""What the camera does: points tracked from frame to frame, a similarity transform fitted, the result named."""

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl

from opensora.config.options import Options, opt
from tools.data.engine.stage import LARGEST_SIDE, SMALLEST_SIDE, Analyser, ClipInfo, Picture, PixelStage, Row
from tools.data.stages.motion import Clock

MIN_POINTS = 8  # fewer points say nothing about the camera
REDETECT = 0.6  # of the points left: find new ones
WINDOW = (15, 15)  # px around a point that are looked for in the next frame
LEVELS = 3  # halvings of the frame: motion of up to about 100 px is found
SMOOTHING = 5  # frames over which intended camera motion is even


@dataclass(frozen=True, kw_only=True)
class CameraOptions(Options):
    """Camera motion from tracked points."""

    fps: float = opt(10.0, "frames are compared at this rate", "frames/s", above=0, most=1e3)
    side: int = opt(320, "long side for the tracking", "px", least=SMALLEST_SIDE, most=LARGEST_SIDE)
    points: int = opt(80, "points tracked at most", least=8, most=100_000)
    pan: float = opt(0.03, "speed from which it is a pan or tilt", "frame widths/s", above=0, most=100)
    zoom: float = opt(0.03, "change of scale from which it is a zoom", "1/s", above=0, most=100)
    shake: float = opt(0.004, "deviation from smooth motion from which it is shake", "frame widths", above=0, most=100)


class Camera(PixelStage):
    """Camera motion of a clip: speeds, unsteadiness and one label.

    Columns: ``pan`` (frame widths per second, positive to the right), ``tilt`` (frame widths per second, positive
    down), ``zoom`` (logarithm of the scale per second, positive inwards), ``jitter`` (frame widths), and
    ``camera_motion``: static, pan left/right, tilt up/down, zoom in/out, shake, or unknown (nothing to track).
    """

    settings: CameraOptions

    name = "camera"
    version = 2
    adds: ClassVar = {
        "pan": pl.Float64,
        "tilt": pl.Float64,
        "zoom": pl.Float64,
        "jitter": pl.Float64,
        "camera_motion": pl.String,
    }

    def analyser(self, row: Row, info: ClipInfo) -> Analyser:
        """Camera motion of one clip."""
        return CameraAnalyser(self.settings, info)


class CameraAnalyser(Analyser):
    """Lucas-Kanade tracks between frames some tenths of a second apart; RANSAC leaves moving things out."""

    def __init__(self, settings: CameraOptions, info: ClipInfo) -> None:
        self.settings = settings
        self.is_image = info.fps == 0
        self.clock = Clock(settings.fps, info.fps)
        self.before: tuple[float, np.ndarray] | None = None
        self.points: np.ndarray | None = None
        self.found = 0
        self.steps: list[tuple[float, float, float, float]] = []  # seconds, x, y in frame widths, log scale
        self.lost = 0

    def add(self, index: int, time: float, frame: Picture) -> None:
        """Track from the frame before to this one."""
        if self.is_image or not self.clock.due(time):
            return
        image = frame.small(self.settings.side)
        if self.before is not None:
            start, last = self.before
            step = self._step(last, image)
            if step is None:
                self.lost += 1
            else:
                self.steps.append((time - start, *step))
        self.before = (time, image)

    def _step(self, last: np.ndarray, image: np.ndarray) -> tuple[float, float, float] | None:
        if self.points is None or len(self.points) < max(MIN_POINTS, REDETECT * self.found):
            found = cv2.goodFeaturesToTrack(last, self.settings.points, 0.01, 8)
            self.points, self.found = found, 0 if found is None else len(found)
        if self.points is None or len(self.points) < MIN_POINTS:
            self.points = None
            return None
        opencv: Any = cv2  # its type stubs do not know that None asks for new points
        moved, status, error = opencv.calcOpticalFlowPyrLK(
            last, image, self.points, None, winSize=WINDOW, maxLevel=LEVELS
        )
        good = (status[:, 0] == 1) & (error[:, 0] < 30)
        old, new = self.points[good], moved[good]
        if len(new) < MIN_POINTS:
            self.points = None
            return None
        matrix, inliers = cv2.estimateAffinePartial2D(old, new, method=cv2.RANSAC, ransacReprojThreshold=1.0)
        if matrix is None or inliers.sum() < MIN_POINTS:
            self.points = None
            return None
        height, width = image.shape
        kept = new[inliers[:, 0] == 1]
        inside = (kept[:, 0, 0] > 2) & (kept[:, 0, 0] < width - 3) & (kept[:, 0, 1] > 2) & (kept[:, 0, 1] < height - 3)
        self.points = kept[inside]
        centre = np.array([(width - 1) / 2, (height - 1) / 2])
        shift = matrix[:, :2] @ centre + matrix[:, 2] - centre
        scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
        # what is seen moves against the camera
        return -float(shift[0]) / width, -float(shift[1]) / width, float(np.log(scale))

    def result(self) -> Row:
        """The columns of ``Camera``."""
        if self.is_image or not self.steps or self.lost > len(self.steps):
            empty: Row = dict.fromkeys(("pan", "tilt", "zoom", "jitter"))
            return {**empty, "camera_motion": "static" if self.is_image else "unknown"}
        steps = np.asarray(self.steps)
        seconds = steps[:, 0].sum()
        pan, tilt, zoom = (float(steps[:, axis].sum() / seconds) for axis in (1, 2, 3))
        jitter = unsteadiness(steps[:, 1:3])
        label = camera_label(pan, tilt, zoom, jitter, self.settings)
        return {"pan": pan, "tilt": tilt, "zoom": zoom, "jitter": jitter, "camera_motion": label}


def unsteadiness(steps: np.ndarray) -> float:
    """How far the camera is from where even motion would have it.

    Args:
        steps: [N, 2] shifts between frames.

    Returns:
        Root mean square distance of the path from itself smoothed over ``SMOOTHING`` frames, in units of ``steps``.
    """
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    if len(path) < SMOOTHING:
        return 0.0
    kernel = np.full(SMOOTHING, 1 / SMOOTHING)
    smooth = np.stack([np.convolve(path[:, axis], kernel, "valid") for axis in (0, 1)], axis=1)
    edge = SMOOTHING // 2
    return float(np.sqrt(np.square(path[edge:-edge] - smooth).sum(axis=1).mean()))


def camera_label(pan: float, tilt: float, zoom: float, jitter: float, settings: CameraOptions) -> str:
    """The one word for a camera motion: what is strongest, measured in multiples of its threshold."""
    if jitter >= settings.shake and jitter * 5 >= max(abs(pan), abs(tilt)):
        return "shake"
    strengths = {
        ("pan right" if pan > 0 else "pan left"): abs(pan) / settings.pan,
        ("tilt down" if tilt > 0 else "tilt up"): abs(tilt) / settings.pan,
        ("zoom in" if zoom > 0 else "zoom out"): abs(zoom) / settings.zoom,
    }
    label = max(strengths, key=lambda name: strengths[name])
    return label if strengths[label] >= 1 else "static"
