"""Latents as small pictures while they are made: the linear map to RGB that fits an autoencoder best.

The map is found by least squares, from what the autoencoder makes of generated clips, and then from every video
that is made, so that it needs no table of autoencoders and gets better with use.
"""

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

CLIPS, LATENT_SIDE = 24, 8  # drawn for the first fit, and how many latents wide
COLOURS = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1))
FIRST_WEIGHT = 1 / CLIPS  # of a drawn clip: all of them count like one video
FORGETTING = 0.995  # of earlier ones by each
SIDE = 192  # pixels of a preview's longer side
MOST_FRAMES = 24
MILLISECONDS = 160  # of a frame


def drawn_clips(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Clips [N, 3, frames, height, width] in [-1, 1]: a disc or a rectangle in a strong colour, on a dark or light
    ground."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    clips = np.empty((CLIPS, 3, frames, height, width), np.float32)
    for number, clip in enumerate(clips):
        clip[:] = random.choice([-0.8, 0.8]) + random.uniform(-0.15, 0.15)
        radius = random.uniform(0.12, 0.25) * min(height, width)
        top, left = random.uniform(0.2, 0.8, 2) * (height, width)
        down, right = np.abs(rows - top), np.abs(columns - left)
        inside = np.hypot(down, right) < radius if number % 2 else np.maximum(down, right) < radius
        clip[:, :, inside] = np.array(COLOURS[number % len(COLOURS)])[:, None, None] * random.uniform(0.6, 0.9)
    return torch.from_numpy(clips.clip(-1, 1))


class ColourMap:
    """The affine map from latents to RGB in [-1, 1] that fits all that was shown to it.

    Args:
        channels: of a latent.
    """

    def __init__(self, channels: int) -> None:
        self.gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self.cross = torch.zeros(channels + 1, 3, dtype=torch.float64)
        self.solution: Tensor | None = None  # [C + 1, 3]; None until something was shown

    @classmethod
    @torch.no_grad()
    def of(cls, ae: Autoencoder, device: torch.device, dtype: torch.dtype) -> "ColourMap":
        """The map of drawn clips; one that was shown nothing where the autoencoder does not take them.

        Args:
            ae: autoencoder, on ``device``.
            device: where it works.
            dtype: of its weights.
        """
        spec, found = LatentSpec.of(ae), cls(ae.latent_channels)
        time, rows, columns = spec.compression
        clips = drawn_clips(time + int(spec.is_causal), LATENT_SIDE * rows, LATENT_SIDE * columns)
        try:
            for clip in clips.split(1):
                found.show(ae.encode(clip.to(device, dtype), sample_posterior=False)[0], clip[0], FIRST_WEIGHT)
        except (RuntimeError, TypeError, ValueError) as error:
            logger.info("no preview in colour before the first video: the autoencoder takes no clips (%s)", error)
            return cls(ae.latent_channels)
        return found

    def show(self, latents: Tensor, pixels: Tensor, weight: float = 1.0) -> None:
        """Fit a video as well.

        Args:
            latents: [C, T, h, w].
            pixels: [3, T', H, W] in [-1, 1].
            weight: of it.
        """
        frames, rows, columns = latents.shape[1:]
        small = F.adaptive_avg_pool3d(pixels[None].float().cpu(), (frames, rows, columns))[0]
        known = _with_one(latents).double()
        share = weight / len(known)
        self.gram = FORGETTING * self.gram + share * known.T @ known
        self.cross = FORGETTING * self.cross + share * known.T @ small.flatten(1).T.double()
        ridge = 1e-4 * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64)
        self.solution = torch.linalg.solve(self.gram + ridge, self.cross).float()

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Latents [C, T, h, w] as uint8 [T, h, w, 3]; before anything was shown, the first channels scaled to what they
        span."""
        size = latents.shape[1:]
        if self.solution is not None:
            colours = (_with_one(latents) @ self.solution).reshape(*size, 3)
        else:
            x = latents.float().cpu()
            colours = x[[min(channel, len(x) - 1) for channel in range(3)]].movedim(0, -1)
            colours = (colours - colours.mean()) / (2 * colours.std() + 1e-6)
        return colours.nan_to_num().clamp(-1, 1).add(1).mul(127.5).byte().numpy()


def _with_one(latents: Tensor) -> Tensor:
    """Latents [C, T, h, w] as rows [T h w, C + 1] on the CPU, with a one for the constant."""
    flat = latents.detach().float().cpu().flatten(1).T
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)


class Denoised:
    """Where latents are heading: what a step's velocity says of its end, x - t v (exact for Euler steps).

    Args:
        times: schedule, 1 (noise) to 0.
        windows: runs of this schedule, one after another.
    """

    def __init__(self, times: Sequence[float], windows: int = 1) -> None:
        self.times, self.windows = times, windows
        self._before: tuple[int, Tensor] | None = None

    def __call__(self, step: int, total: int, latents: Tensor) -> Tensor:
        """The estimate after a step (from 1); the latents themselves where nothing is known of the step before."""
        before, self._before = self._before, (step, latents)
        steps = len(self.times) - 1
        within = (step - 1) % steps + 1
        known = total == steps * self.windows and within > 1 and before is not None and before[0] == step - 1
        if not known or before is None or before[1].shape != latents.shape:
            return latents
        velocity = (latents - before[1]) / (self.times[within] - self.times[within - 1])
        return latents - self.times[within] * velocity


def write_preview(latents: Tensor, colours: ColourMap, path: Path) -> Path:
    """Write latents [C, T, h, w] as a small picture that moves."""
    shown = colours(latents)[:MOST_FRAMES]
    scale = SIDE / max(shown.shape[1:3])
    size = (max(round(shown.shape[2] * scale), 1), max(round(shown.shape[1] * scale), 1))
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in shown]

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
