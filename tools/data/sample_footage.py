"""Makes raw footage to try the tools on, with known truth: ``python tools/data/sample_footage.py --out DIR``.

The drawing functions give uint8 RGB frames [T, H, W, 3] whose cuts, speeds and texts are known; tests build on them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.files import write_beside, write_text
from opensora.utils.video import save_image, save_video
from tools.arguments import user_path
from tools.outputs import new_folder

Frames = np.ndarray


def texture(height: int, width: int, seed: int, tint: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """A picture full of detail at all sizes, uint8 [H, W, 3]; other seeds give other pictures."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width))
    for cells, weight in ((4, 1.0), (10, 0.7), (28, 0.5), (70, 0.4)):
        noise = rng.random((max(round(cells * height / width), 2), cells)).astype(np.float32)
        image += weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    low, high = np.percentile(image, (5, 95))
    image = ((image - low) / (high - low)).clip(0, 1)
    return (image[..., None] * np.asarray(tint) * 225 + 15).clip(0, 255).astype(np.uint8)


def scenery(height: int, width: int, seed: int, tint: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """The same with hard edges, as sharp footage has them."""
    image = texture(height, width, seed).astype(np.int32)
    return ((image // 56 * 56 + image // 8) * np.asarray(tint)).clip(0, 255).astype(np.uint8)


def still(image: np.ndarray, frames: int) -> Frames:
    """The same picture all along."""
    return np.repeat(image[None], frames, axis=0)


def view(image: np.ndarray, size: tuple[int, int], x: float, y: float, scale: float = 1.0) -> np.ndarray:
    """What a camera of ``size`` (height, width) sees of a picture: centred at (x, y), enlarged by ``scale``."""
    height, width = size
    matrix = np.array([[scale, 0, width / 2 - scale * x], [0, scale, height / 2 - scale * y]], np.float64)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def pan(image: np.ndarray, size: tuple[int, int], frames: int, x: float = 0.0, y: float = 0.0) -> Frames:
    """A camera that moves by (x, y) pixels per frame over a picture, passing its middle halfway."""
    centre = image.shape[1] / 2, image.shape[0] / 2
    steps = np.arange(frames) - (frames - 1) / 2
    return np.stack([view(image, size, centre[0] + x * step, centre[1] + y * step) for step in steps])


def zoom(image: np.ndarray, size: tuple[int, int], frames: int, factor: float) -> Frames:
    """A camera that enlarges by ``factor`` per frame."""
    centre = image.shape[1] / 2, image.shape[0] / 2
    return np.stack([view(image, size, *centre, factor**step) for step in range(frames)])


def shake(image: np.ndarray, size: tuple[int, int], frames: int, pixels: float, seed: int = 0) -> Frames:
    """A camera that jumps about by so many pixels (standard deviation) per frame."""
    offsets = np.random.default_rng(seed).normal(0, pixels, (frames, 2))
    return np.stack([view(image, size, image.shape[1] / 2 + x, image.shape[0] / 2 + y) for x, y in offsets])


def dissolve(first: Frames, second: Frames, frames: int) -> Frames:
    """The end of one take blended into the beginning of another over so many frames."""
    share = (np.arange(1, frames + 1) / (frames + 1))[:, None, None, None]
    blend = first[-frames:] * (1 - share) + second[:frames] * share
    return np.concatenate([first[:-frames], blend.round().astype(np.uint8), second[frames:]])


def letterbox(frames: Frames, rows: int) -> Frames:
    """With so many black rows above and below."""
    return np.pad(frames, ((0, 0), (rows, rows), (0, 0), (0, 0)))


def blurred(frames: Frames, sigma: float) -> Frames:
    """Out of focus."""
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def titled(frames: Frames, text: str) -> Frames:
    """With white text on a dark bar across the middle."""
    frames = frames.copy()
    height, width = frames.shape[1:3]
    scale = width / 20 / max(len(text), 1)
    size, _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    top = height // 2 - size[1]
    for frame in frames:
        frame[top : top + 2 * size[1]] = 20
        place = ((width - size[0]) // 2, top + 3 * size[1] // 2)
        cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 2, cv2.LINE_AA)
    return frames


def make_footage(folder: Path, size: tuple[int, int] = (180, 320), fps: int = 24) -> list[Path]:
    """Write a small set of raw videos and a picture, some fit for training and some not, and ``captions.csv``.

    Args:
        folder: new or empty.
        size: height and width in pixels.
        fps: frames per second.

    Raises:
        UserError: there is something in the folder already.
    """
    with new_folder(folder, "sample_footage"):
        return _draw_all(folder, size, fps)


def _draw_all(folder: Path, size: tuple[int, int], fps: int) -> list[Path]:
    big = (size[0] * 2, size[1] * 2)
    tints = [(1.0, 0.8, 0.6), (0.6, 0.8, 1.0), (0.7, 1.0, 0.7), (1.0, 0.7, 0.9), (0.9, 0.9, 0.5)]
    pictures = [scenery(*big, seed, tints[seed % len(tints)]) for seed in range(12)]
    seconds = 3 * fps
    takes = {
        "pan right": pan(pictures[0], size, seconds, x=1.5),
        "tilt down": pan(pictures[1], size, seconds, y=1.0),
        "zoom in": zoom(pictures[2], size, seconds, 1.006),
        "hand held": shake(pictures[3], size, seconds, 3.0),
        "photo": still(view(pictures[4], size, size[1], size[0]), seconds),
        "out of focus": blurred(pan(pictures[5], size, seconds, x=1.0), 6.0),
        "title": titled(pan(pictures[6], size, seconds, x=-1.0), "SUBSCRIBE NOW"),
        "wide screen": letterbox(pan(pictures[7], (size[0] - 40, size[1]), seconds, x=-1.5), 20),
        "too short": pan(pictures[8], size, fps, x=1.0),
    }
    takes["three shots"] = np.concatenate([pan(pictures[i], size, seconds, x=i - 10.0) for i in (9, 11, 8)])
    paths = [save_video(frames, folder / f"{name}.mp4", fps, crf=16) for name, frames in takes.items()]
    paths.append(save_video(takes["pan right"], folder / "again" / "smaller file.mp4", fps, crf=30))
    paths.append(save_image(pictures[10], folder / "picture.png"))
    start = paths[0].read_bytes()[:2000]
    broken = write_beside(folder / "broken.mp4", lambda path: path.write_bytes(start))
    lines = [f"{path.relative_to(folder)},a rough pattern of soft and hard patches" for path in paths]
    write_text("\n".join(["path,text", *lines, ""]), folder / "captions.csv")
    return [*paths, broken]


def main(argv: list[str] | None = None) -> None:
    """Make the footage and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=user_path, required=True, help="new folder")
    folder = parser.parse_args(argv).out
    print(f"{len(make_footage(folder))} files: {folder}")


if __name__ == "__main__":
    run_main(main)
