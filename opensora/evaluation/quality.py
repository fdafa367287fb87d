"""How close a reconstruction is to its original: PSNR, SSIM and temporal flicker of 8-bit clips, in float64."""

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

PEAK = 255.0
Frames = NDArray[np.uint8]


def psnr(original: Frames, reconstruction: Frames) -> float:
    """Peak signal-to-noise ratio of a clip, in dB: ``10 log10(255^2 / MSE)`` over all its values; infinite if equal.

    Args:
        original, reconstruction: ``[T, H, W, 3]``.
    """
    error = np.mean(np.square(original.astype(np.float64) - reconstruction))
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(original: Frames, reconstruction: Frames) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames and colours: 1 for equal clips.

    As in the paper: an 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03; places where the window
    would leave the frame do not count.

    Args:
        original, reconstruction: ``[T, H, W, 3]``, at least 11 x 11 px.
    """
    values = [
        structural_similarity(
            a, b, data_range=PEAK, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(original, reconstruction, strict=True)
    ]
    return float(np.mean(values))


def flicker(original: Frames, reconstruction: Frames) -> float:
    """Temporal error: mean absolute difference between the changes from frame to frame, in 8-bit levels.

    0 if the reconstruction moves exactly as the original does, whatever constant error it has; NaN for pictures.

    Args:
        original, reconstruction: ``[T, H, W, 3]``.
    """
    if len(original) < 2:
        return float("nan")
    changes = (np.diff(clip.astype(np.float64), axis=0) for clip in (original, reconstruction))
    first, second = changes
    return float(np.mean(np.abs(first - second)))
