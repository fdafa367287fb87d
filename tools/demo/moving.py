"""Moving pictures for the documentation: videos in a labelled grid, as one animated WebP."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WHITE, INK, GAP, FONT_SIZE = (255, 255, 255), (31, 35, 40), 8, 14


def grid(videos: Sequence[np.ndarray], labels: Sequence[str], columns: int, scale: int) -> list[Image.Image]:
    """Videos of one shape and length side by side, each with its label above; one picture per frame.

    Args:
        videos: uint8 [T, H, W, 3].
        labels: one line of text per video, shortened where it is wider than the video.
        columns: videos in a row.
        scale: whole-number enlargement of the pixels.
    """
    length, height, width = videos[0].shape[:3]
    font = ImageFont.load_default(size=FONT_SIZE)
    cell_width, cell_height = width * scale + GAP, height * scale + FONT_SIZE + 2 * GAP
    rows = -(-len(videos) // columns)
    size = (cell_width * min(columns, len(videos)) + GAP, cell_height * rows + GAP)
    pictures = []
    for frame in range(length):
        picture = Image.new("RGB", size, WHITE)
        draw = ImageDraw.Draw(picture)
        for index, (video, label) in enumerate(zip(videos, labels)):
            x, y = GAP + index % columns * cell_width, GAP + index // columns * cell_height
            draw.text((x, y), _fitted(label, font, width * scale), fill=INK, font=font)
            tile = Image.fromarray(video[frame]).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            picture.paste(tile, (x, y + FONT_SIZE + GAP // 2))
        pictures.append(picture)
    return pictures


def _fitted(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The label, without the words at its end that do not fit."""
    words = label.split()
    while len(words) > 1 and font.getlength(" ".join(words)) > width:
        words.pop()
    return " ".join(words)


def save_animation(
    pictures: Sequence[Image.Image], path: Path, milliseconds: int | Sequence[int], quality: int = 70
) -> None:
    """Write pictures as an animated WebP that repeats for ever.

    Args:
        pictures: of one size.
        path: file to write.
        milliseconds: how long each is shown, or all of them.
        quality: of the compression, 0 to 100.
    """
    shown = milliseconds if isinstance(milliseconds, int) else list(milliseconds)
    pictures[0].save(
        path,
        "WEBP",
        save_all=True,
        append_images=list(pictures[1:]),
        duration=shown,
        loop=0,
        quality=quality,
        method=4,
    )
