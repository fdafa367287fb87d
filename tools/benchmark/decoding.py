"""How much faster the frames of a training sample are read than their whole clip.

``python tools/benchmark/decoding.py [--size 360x640] [--seconds 10] [--frames 33] [--repeats 15]``

Clips are generated: moving texture with noise, h264, with a key frame every 12, 48 or 250 frames (250 is
x264's default; footage with cuts has more). Both ways decode on one thread, as loader workers do, and read the same
windows; the ratio is that of the medians. Times are processor time, which on an idle machine is what a clock shows and
which other programs change least.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import numpy as np

from opensora.config import run_main
from opensora.datasets.video_io import read_frames
from opensora.utils.errors import UserError
from opensora.utils.temporary import TemporaryFolder
from tools.arguments import Bounded

MOST_SIDE = 8192  # px of the clips


def make_clip(path: Path, frames: int, size: tuple[int, int], fps: int, key_every: int) -> None:
    """Write a clip of a texture that drifts under noise, so that frames cost about what footage costs."""
    height, width = size
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 8 + 40, width // 8 + 40, 3), dtype=np.uint8)
    texture = coarse.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        options = {"g": str(key_every), "keyint_min": str(key_every), "sc_threshold": "0", "preset": "veryfast"}
        stream.options = {**options, "bf": "3", "b-pyramid": "normal", "refs": "3"}
        for i in range(frames):
            shift = i % 300
            picture = texture[shift : shift + height, shift : shift + width].astype(np.int16)
            picture = np.clip(picture + rng.integers(-4, 5, (height, width, 1)), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def read_whole(path: Path, indices: list[int]) -> np.ndarray:
    """Decode the clip from end to end into one array, as Open-Sora 2.0 does, then take the frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        frames = np.zeros((stream.frames, stream.height, stream.width, 3), dtype=np.uint8)
        for i, frame in enumerate(container.decode(stream)):
            frames[i] = frame.to_ndarray(format="rgb24")
    return frames[indices]


def compare(path: Path, total: int, frames: int, repeats: int) -> tuple[float, float]:
    """Median processor seconds of whole-clip decoding and of reading only the frames wanted, over random windows."""
    rng, whole, wanted = np.random.default_rng(1), [], []
    for _ in range(repeats):
        start = int(rng.integers(0, total - frames + 1))
        indices = list(range(start, start + frames))
        begin = time.process_time()
        expected = read_whole(path, indices)
        middle = time.process_time()
        found = read_frames(path, indices)
        whole.append(middle - begin)
        wanted.append(time.process_time() - middle)
        assert np.array_equal(expected, found)
    return statistics.median(whole), statistics.median(wanted)


def main(argv: list[str] | None = None) -> None:
    """Make the clips, time both ways, print a table."""
    parser = argparse.ArgumentParser(description="time of reading only wanted frames against whole clips")
    parser.add_argument("--size", default="360x640", help="height x width of the clips")
    parser.add_argument("--seconds", type=int, action=Bounded, least=1, most=3600, default=10)
    parser.add_argument("--fps", type=int, action=Bounded, least=1, most=1000, default=24)
    parser.add_argument(
        "--frames", type=int, action=Bounded, least=1, most=10**5, default=33, help="frames wanted, in a row"
    )
    parser.add_argument("--repeats", type=int, action=Bounded, least=1, most=10**5, default=15)
    args = parser.parse_args(argv)
    height, _, width = args.size.partition("x")
    total = args.seconds * args.fps
    sides = [int(side) if side.isdecimal() else 0 for side in (height, width)]
    if not all(1 <= side <= MOST_SIDE for side in sides) or args.frames > total:
        raise UserError(
            f"--size is HEIGHTxWIDTH, such as 360x640, of sides up to {MOST_SIDE}, and --frames at most seconds x fps"
        )
    print(f"{total} frames of {args.size}, {args.frames} wanted, median of {args.repeats}")
    print(f"{'key frame every':>15} {'whole clip':>11} {'wanted only':>11} {'faster':>7}")
    with TemporaryFolder() as folder:
        for key_every in (12, 48, 250):
            clip = folder / f"{key_every}.mp4"
            make_clip(clip, total, (sides[0], sides[1]), args.fps, key_every)
            whole, wanted = compare(clip, total, args.frames, args.repeats)
            print(f"{key_every:>15} {whole * 1e3:>8.0f} ms {wanted * 1e3:>8.0f} ms {whole / wanted:>6.1f}x")


if __name__ == "__main__":
    run_main(main)
