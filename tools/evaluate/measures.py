"""Measures of a clip that need no weights: motion, flicker, sharpness, blocks, seams, colours, frozen frames.

Clips are uint8 ``[T, H, W, 3]``. What moves is found by optical flow (Dense Inverse Search, Kroeger et al. 2016).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.measure import blur_effect

Frames = NDArray[np.uint8]
FloatArray = NDArray[np.float64]

FLOW_SIDE = 256  # px of the long side for the flow, also of smaller clips, whose motion it could not resolve otherwise
SHARP_FRAMES = 8  # frames whose sharpness is looked at
STILL = 0.05  # px of flow that count as no motion when jerk is set against motion
FROZEN = 0.1  # 8-bit levels of mean change between frames below which nothing moves
BLOCK = 8  # px: grid of the transforms of codecs
EDGE = 4  # px at the border of a frame in which no seam is looked for
THUMB = 32  # px of the pictures by which videos of one prompt are told apart


@dataclass(frozen=True)
class Measure:
    """What a column of the table means.

    Attributes:
        meaning: in one sentence.
        better: "high", "low", or "" where neither is better as such.
    """

    meaning: str
    better: str = ""


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "motion": Measure("mean optical flow, in frame widths per second"),
        "jerk": Measure("change of acceleration of the flow, relative to the flow: uneven or trembling motion", "low"),
        "flicker": Measure("change of pixels that motion does not explain, in 8-bit levels", "low"),
        "brightness_flicker": Measure("uneven change of the mean brightness from frame to frame, 8-bit levels", "low"),
        "sharpness": Measure("1 - blur effect (Crete et al. 2007): 0 is blurred, 1 sharp", "high"),
        "blockiness": Measure("steps on the 8 px grid against steps beside it: 1 is none", "low"),
        "seam": Measure(
            "share of a line across the frame that is a step, in the worst place, above the usual share", "low"
        ),
        "colourfulness": Measure("Hasler and Suesstrunk (2003): 0 is grey, above 60 very colourful"),
        "duplicates": Measure("share of frames that equal the one before to the last bit", "low"),
        "frozen": Measure("longest run of frames without any change, as a share of the clip", "low"),
        "jump": Measure("largest change between frames against the usual one: cuts and flashes", "low"),
        "start_psnr": Measure("first frame against the picture it was made from, in dB", "high"),
        "start_ssim": Measure("the same as structural similarity", "high"),
        "join": Measure("change where given frames end and made ones begin, against the usual one: 1 is none", "low"),
        "diversity": Measure("RMS distance to the other videos of the prompt, 0 to 1 (32 px pictures)", "high"),
    }
)


def measure_clip(frames: Frames, fps: float) -> dict[str, float]:
    """All measures of a clip on its own; those of time are absent for a picture.

    Args:
        frames: the clip.
        fps: its rate; NaN for a picture.
    """
    found = {"sharpness": sharpness(frames), "blockiness": blockiness(frames), "colourfulness": colourfulness(frames)}
    found["seam"] = seam(frames)[0]
    if len(frames) < 2:
        return found
    changes = frame_changes(frames)
    small, flows = optical_flow(frames)
    found |= {"motion": float(lengths(flows).mean()) / small.shape[2] * fps, "jerk": jerk(flows)}
    found |= {"flicker": flicker(small, flows), "brightness_flicker": brightness_flicker(frames)}
    found |= {"duplicates": duplicates(frames), "frozen": frozen(changes), "jump": jump(changes)}
    return found


# ------------------------------------------------------------------------------------------------------------ motion


def optical_flow(frames: Frames) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Grey frames ``[T, h, w]`` at :data:`FLOW_SIDE`, and the flow ``[T-1, h, w, 2]`` from each to the next, in px."""
    scale = FLOW_SIDE / max(frames.shape[1:3])
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = np.stack([cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=how) for frame in frames])
    opencv: Any = cv2  # its type stubs lack this class
    dis = opencv.DISOpticalFlow_create(opencv.DISOPTICAL_FLOW_PRESET_FAST)
    return grey, np.stack([dis.calc(first, second, None) for first, second in itertools.pairwise(grey)])


def lengths(flows: NDArray[np.float32]) -> FloatArray:
    """Length of each vector of a flow ``[..., 2]``."""
    return np.linalg.norm(flows.astype(np.float64), axis=-1)


def jerk(flows: NDArray[np.float32]) -> float:
    """Mean second difference of the flow in time over its mean length; 0 for even motion, NaN below three flows."""
    if len(flows) < 3:
        return float("nan")
    second = flows[2:] - 2 * flows[1:-1] + flows[:-2]
    return float(lengths(second).mean() / max(lengths(flows).mean(), STILL))


def flicker(grey: NDArray[np.uint8], flows: NDArray[np.float32]) -> float:
    """Mean difference of each frame to the next one, moved back along the flow; pixels that leave do not count."""
    rows, columns = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grey.shape[1:]), indexing="ij")
    values = []
    for first, second, flow in zip(grey, grey[1:], flows):
        x, y = columns + flow[..., 0], rows + flow[..., 1]
        moved = cv2.remap(second.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = (x >= 0) & (y >= 0) & (x <= grey.shape[2] - 1) & (y <= grey.shape[1] - 1)
        difference = np.abs(moved - first)[inside]
        values.append(float(difference.mean()) if difference.size else 0.0)
    return float(np.mean(values))


def brightness_flicker(frames: Frames) -> float:
    """Mean absolute second difference of the mean brightness; a slow fade has none."""
    mean = frames.mean(axis=(1, 2, 3))
    return float(np.abs(np.diff(mean, 2)).mean()) if len(mean) > 2 else 0.0


# ------------------------------------------------------------------------------------------------------------- frames


def sharpness(frames: Frames) -> float:
    """Median over some frames of 1 - blur effect."""
    chosen = np.linspace(0, len(frames) - 1, min(SHARP_FRAMES, len(frames))).round().astype(int)
    values = [blur_effect(frames[index], channel_axis=-1) for index in chosen]
    finite = [value for value in values if np.isfinite(value)]  # a frame of one colour has none
    return 1.0 - float(np.median(finite)) if finite else 0.0


def colourfulness(frames: Frames) -> float:
    """Spread and strength of the opponent colours red-green and yellow-blue, mean over frames."""
    red, green, blue = np.moveaxis(frames.astype(np.float64), -1, 0)
    first, second = red - green, (red + green) / 2 - blue
    spread = np.hypot(first.std(axis=(1, 2)), second.std(axis=(1, 2)))
    strength = np.hypot(first.mean(axis=(1, 2)), second.mean(axis=(1, 2)))
    return float((spread + 0.3 * strength).mean())


def blockiness(frames: Frames) -> float:
    """Mean step between neighbouring pixels on the grid over that elsewhere, of rows and columns together."""
    luma = frames.astype(np.float64).mean(-1)
    on, off = [], []
    for steps in (np.abs(np.diff(luma, axis=2)).mean((0, 1)), np.abs(np.diff(luma, axis=1)).mean((0, 2))):
        border = np.arange(1, len(steps) + 1) % BLOCK == 0
        on.append(steps[border])
        off.append(steps[~border])
    between, inside = (float(np.concatenate(part).mean()) if np.concatenate(part).size else 0.0 for part in (on, off))
    return (between + 0.1) / (inside + 0.1)  # a tenth of a level: flat clips have no blocks


def seam(frames: Frames) -> tuple[float, str]:
    """How much more of a line across the frame is a step than is usual, in the worst place, and where (``x=64``).

    A pixel pair of a line is a step where it differs, after the local trend, by more than both neighbouring pairs do.
    That is so at a third of all pairs by chance, at more on the grid of a codec, and at nearly all on the border of a
    tile, however faint it is; so a line is compared with the others on the grid, or with those off it. A seam stays
    where it is while the picture moves, so the differences are averaged over the frames first.
    """
    luma = frames.astype(np.float32).mean(-1)
    best = (0.0, "none")
    for name, axis in (("x", 2), ("y", 1)):
        lines = np.moveaxis(luma, axis, 0)  # [line, T, other]
        if len(lines) < 2 * EDGE + 3:
            continue
        curved = np.abs((lines[3:] - 3 * lines[2:-1] + 3 * lines[1:-2] - lines[:-3]).mean(1))  # of pairs (1, 2) ...
        share = ((curved[1:-1] > curved[:-2]) & (curved[1:-1] > curved[2:])).mean(1)
        places = np.arange(len(share)) + 3  # the pixel after the pair
        for on_grid in (True, False):
            chosen = (places % BLOCK == 0) == on_grid
            chosen &= (places >= EDGE) & (places <= len(lines) - EDGE)
            if not chosen.any():
                continue
            excess = share[chosen] - np.median(share[chosen])
            if excess.max() > best[0]:
                best = float(excess.max()), f"{name}={places[chosen][excess.argmax()]}"
    return best


# --------------------------------------------------------------------------------------------------------------- time


def frame_changes(frames: Frames) -> FloatArray:
    """Mean absolute change ``[T-1]`` from each frame to the next, in 8-bit levels."""
    return np.array([cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(frames)], np.float64)


def duplicates(frames: Frames) -> float:
    """Share of frames, but for the first, that are exactly the one before."""
    return float(np.mean([np.array_equal(a, b) for a, b in itertools.pairwise(frames)]))


def frozen(changes: FloatArray) -> float:
    """Longest run of changes below :data:`FROZEN`, as a share of all."""
    longest = run = 0
    for change in changes:
        run = run + 1 if change < FROZEN else 0
        longest = max(longest, run)
    return longest / len(changes)


def jump(changes: FloatArray) -> float:
    """Largest change over the median one."""
    return float((changes.max() + FROZEN) / (np.median(changes) + FROZEN))


def join(changes: FloatArray, frame: int) -> float:
    """Change into ``frame`` over the median of up to four changes on each side of it.

    Args:
        changes: of the clip.
        frame: the first one after a border, from 1.
    """
    around = np.delete(changes, frame - 1)[max(frame - 5, 0) : frame + 3]
    return float((changes[frame - 1] + FROZEN) / ((np.median(around) if around.size else 0.0) + FROZEN))


def diversity(clips: list[FloatArray]) -> list[float]:
    """For each of several small clips of one prompt, its mean distance to the others (see :func:`thumbnails`)."""
    distances = [[float(np.sqrt(np.mean((a - b) ** 2))) for b in clips] for a in clips]
    return [sum(row) / (len(clips) - 1) for row in distances] if len(clips) > 1 else [float("nan")] * len(clips)


def thumbnails(frames: Frames, count: int = 8) -> FloatArray:
    """Some frames of a clip at 32 x 32 px, ``[count, 32, 32, 3]`` in [0, 1]; alike for clips of any size and length."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    area = cv2.INTER_AREA
    return np.stack([cv2.resize(frames[index], (THUMB, THUMB), interpolation=area) for index in chosen]) / 255.0
