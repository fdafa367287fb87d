"""Latents as small pictures while they are made: the linear map to RGB that fits an autoencoder best.

The map is found by least squares from what the autoencoder itself makes of pictures drawn on the spot, so that it needs
no table of autoencoders.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opensora.models.autoencoder import Autoencoder, LatentSpec
from opensora.utils.files import write_beside
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

PICTURES, LATENT_SIDE = 32, 8  # drawn for the fit, and how many latents wide
SIDE = 192  # pixels of a preview's longer side
MOST_FRAMES = 24
MILLISECONDS = 160  # of a frame
ENOUGH = 0.3  # share of the variance that a map must explain to be better than none


def drawn_pictures(height: int, width: int, seed: int = 0) -> Tensor:
    """Pictures [N, 3, 1, height, width] in [-1, 1]: a disc or a rectangle on a dark or light ground, in all colours."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    pictures = np.empty((PICTURES, 3, height, width), np.float32)
    for number, picture in enumerate(pictures):
        picture[:] = random.choice([-0.8, 0.8]) + random.uniform(-0.15, 0.15)
        radius = random.uniform(0.12, 0.25) * min(height, width)
        down, right = (
            np.abs(rows - random.uniform(0.2, 0.8) * height),
            np.abs(columns - random.uniform(0.2, 0.8) * width),
        )
        inside = np.hypot(down, right) < radius if number % 2 else np.maximum(down, right) < radius
        picture[:, inside] = random.choice([-0.8, 0.8], (3, 1)) + random.uniform(-0.2, 0.2, (3, 1))
    return torch.from_numpy(pictures.clip(-1, 1))[:, :, None]


@torch.no_grad()
def fit_map(ae: Autoencoder, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The affine map [C + 1, 3] from latents to RGB in [-1, 1]; None where none is any good.

    Args:
        ae: autoencoder, on ``device``.
        device: where it works.
        dtype: of its weights.
    """
    spec = LatentSpec.of(ae)
    _, rows, columns = spec.compression
    pictures = drawn_pictures(LATENT_SIDE * rows, LATENT_SIDE * columns)
    try:
        latents = [ae.encode(each.to(device, dtype), sample_posterior=False) for each in pictures.split(1)]
    except (RuntimeError, TypeError, ValueError) as error:  # one that takes no single frames, say
        logger.info("no preview in colour: the autoencoder takes no pictures (%s)", error)
        return None
    flat = torch.cat(latents).float().cpu().movedim(1, -1).flatten(0, -2)
    flat = torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
    small = F.adaptive_avg_pool2d(pictures[:, :, 0], tuple(latents[0].shape[-2:]))
    colours = small.movedim(1, -1).flatten(0, -2)
    found = torch.linalg.lstsq(flat, colours).solution
    left = (flat @ found - colours).square().mean() / colours.var()
    share = 1 - float(left)
    logger.info("preview: a linear map explains %.0f%% of the colours that the autoencoder encodes", 100 * share)
    return found if math.isfinite(share) and share > ENOUGH else None


class Denoised:
    """Where latents are heading: what a step's velocity says of its end, x - t v (exact for Euler steps).

    Args:
        times: schedule, 1 (noise) to 0.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self.times = times
        self._before: tuple[int, Tensor] | None = None

    def __call__(self, step: int, total: int, latents: Tensor) -> Tensor:
        """The estimate after a step (from 1); the latents themselves where nothing is known of the step before."""
        before, self._before = self._before, (step, latents)
        known = total == len(self.times) - 1 and before is not None and before[0] == step - 1
        if not known or before is None or before[1].shape != latents.shape:
            return latents
        velocity = (latents - before[1]) / (self.times[step] - self.times[step - 1])
        return latents - self.times[step] * velocity


def as_colours(latents: Tensor, fitted: Tensor | None) -> np.ndarray:
    """Latents [C, T, h, w] as uint8 [T, h, w, 3]: by the map, or the first channels scaled to what they span."""
    x = latents.float().cpu()
    if fitted is not None:
        colours = torch.einsum("cthw,cr->thwr", x, fitted[:-1]) + fitted[-1]
    else:
        colours = x[[min(channel, len(x) - 1) for channel in range(3)]].movedim(0, -1)
        colours = (colours - colours.mean()) / (2 * colours.std() + 1e-6)
    return colours.nan_to_num().clamp(-1, 1).add(1).mul(127.5).byte().numpy()


def write_preview(latents: Tensor, fitted: Tensor | None, path: Path) -> Path:
    """Write latents [C, T, h, w] as a small picture that moves."""
    colours = as_colours(latents, fitted)[:MOST_FRAMES]
    scale = SIDE / max(colours.shape[1:3])
    size = (max(round(colours.shape[2] * scale), 1), max(round(colours.shape[1] * scale), 1))
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in colours]

    def write(place: Path) -> None:
        frames[0].save(
            place, "WEBP", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, quality=70, method=0
        )

    return write_beside(path, write)


def write_thumbnail(frames: np.ndarray, path: Path, side: int = 320) -> Path:
    """Write the middle frame of a video uint8 [T, H, W, 3], at most ``side`` pixels wide or high."""
    image = Image.fromarray(frames[len(frames) // 2])
    image.thumbnail((side, side))
    return write_beside(path, lambda place: image.save(place, "WEBP", quality=85))


def write_sheet(frames: np.ndarray, path: Path, most: int = 16, side: int = 256) -> Path:
    """Write frames of a video uint8 [T, H, W, 3] side by side, four a row."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)]
    images = [Image.fromarray(frame) for frame in chosen]
    for image in images:
        image.thumbnail((side, side))
    width, height = images[0].size
    columns = min(4, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return write_beside(path, lambda place: sheet.save(place, "JPEG", quality=85))
