"""The frames read are exactly those that decoding the whole clip gives."""

import av
import numpy as np
import pytest

from opensora.datasets.video_io import BrokenMediaError, read_frames
from opensora.utils.video import read_video, save_video
from tools.benchmark.decoding import compare, make_clip

WINDOWS = [[0, 1, 2], [3, 7, 16], [29, 30, 31, 32], [5], [59], [0, 59], [10, 10, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty frames of noise in several containers, and at a variable rate."""
    folder = tmp_path_factory.mktemp("frames")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), dtype=np.uint8)
    for name in ("a.mp4", "a.mkv", "a.avi", "a.mov"):
        save_video(pixels, folder / name, fps=30000 / 1001)
    with av.open(str(folder / "variable.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "12"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for i, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i + i // 5 * 3  # a pause after every fifth frame
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov", "variable.mp4"])
def test_same_as_the_whole_clip(folder, name):
    whole, _ = read_video(folder / name)
    assert len(whole) == 60
    for window in WINDOWS:
        assert np.array_equal(read_frames(folder / name, window), whole[window]), window


def test_the_benchmark_compares_equal_frames(tmp_path):
    clip = tmp_path / "clip.mp4"
    make_clip(clip, 24, (32, 48), 24, 6)
    whole, wanted = compare(clip, 24, 5, 2)  # asserts that both ways give the same frames
    assert min(whole, wanted) > 0


def test_damaged_clips(folder, tmp_path):
    data = (folder / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    assert len(read_frames(tmp_path / "cut.mkv", [2, 3])) == 2  # what is there can be used
    with pytest.raises(BrokenMediaError, match=r"cut.mkv: (frame 59|cannot be decoded)"):
        read_frames(tmp_path / "cut.mkv", [2, 59])
    with pytest.raises(BrokenMediaError, match="frame 60"):
        read_frames(folder / "a.mp4", [0, 60])
    with pytest.raises(BrokenMediaError, match="cannot be decoded"):
        read_frames(tmp_path / "none.mp4", [0])
