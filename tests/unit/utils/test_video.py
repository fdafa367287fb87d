"""Media files: written whole, read back as they were."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.utils import video
from opensora.utils.errors import UserError
from opensora.utils.video import VideoWriter


@pytest.fixture
def moving_square() -> np.ndarray:
    frames = np.full((9, 48, 64, 3), 30, np.uint8)
    for t in range(9):
        frames[t, 16:32, 4 * t : 4 * t + 16] = (220, 40, 60)
    return frames


def test_video_round_trip(tmp_path, moving_square):
    path = video.save_video(moving_square, tmp_path / "new" / "a.mp4", fps=24, crf=10)
    frames, fps = video.read_video(path)
    assert frames.shape == moving_square.shape
    assert fps == 24
    assert np.abs(frames.astype(int) - moving_square).mean() < 5
    assert video.video_info(path) == video.VideoInfo(9, 48, 64, 24.0)
    np.testing.assert_array_equal(video.read_video(path, max_frames=4)[0], frames[:4])
    np.testing.assert_array_equal(video.read_video(path, max_frames=4, from_end=True)[0], frames[-4:])
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_are_padded_and_rates_may_be_fractions(tmp_path, moving_square):
    path = video.save_video(torch.from_numpy(moving_square[:, :47, :63]), tmp_path / "odd.mp4", fps=23.976)
    info = video.video_info(path)
    assert (info.height, info.width) == (48, 64)
    assert info.fps == pytest.approx(23.976, abs=1e-3)


def test_a_video_is_the_same_whatever_was_in_memory_before(tmp_path, fill_memory):
    """x264 read what it did not write, on some processors, at sizes like this one."""
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 40, 72), (404, 716), mode="bicubic")[0].movedim(0, -1)
    whole = (noise.clamp(0, 1) * 255).byte().numpy()
    frames = np.stack([whole[i : i + 202, 2 * i : 2 * i + 358] for i in range(48)])
    found = []
    for byte in (1, 85, 170):
        fill_memory(byte)
        found.append(video.save_video(frames, tmp_path / f"{byte}.mp4", fps=24).read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("ending", ["mkv", "mov"])
def test_other_containers(tmp_path, moving_square, ending):
    path = video.save_video(moving_square, tmp_path / f"a.{ending}", fps=8)
    assert video.video_info(path).num_frames == 9
    assert video.read_video(path)[0].shape == moving_square.shape


def test_nothing_is_left_of_a_failed_write(tmp_path, moving_square):
    with pytest.raises(ValueError, match="expected uint8"):
        video.save_video(moving_square.astype(np.float32), tmp_path / "a.mp4", 24)

    def fail(path):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        video.write_beside(tmp_path / "b.mp4", fail)
    assert list(tmp_path.iterdir()) == []


def test_image_round_trip(tmp_path, moving_square):
    path = video.save_image(moving_square[0], tmp_path / "a.png")
    np.testing.assert_array_equal(video.read_image(path), moving_square[0])


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (video.read_image(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_16_bits_become_8(tmp_path, kind):
    grey = np.arange(0, 2**16, 2**8, dtype=kind).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    np.testing.assert_array_equal(video.read_image(tmp_path / "grey.tiff")[..., 1], grey // 256)


def test_unreadable_media_is_named(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("not a picture")
    with pytest.raises(UserError, match=r"not a readable image: .*bad\.png"):
        video.read_image(bad)
    with pytest.raises(UserError, match=r"not a readable video: .*bad\.png"):
        video.read_video(bad)
    with pytest.raises(UserError, match="image not found"):
        video.read_image(tmp_path / "none.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff .*8 or 16 bits"):
        video.read_image(tmp_path / "float.tiff")


def test_to_uint8_rounds_and_clips():
    levels = torch.tensor([-2.0, -1, 0, 1, 3]).view(1, 5, 1, 1).expand(3, 5, 2, 2)
    frames = video.to_uint8(levels)
    assert frames.shape == (5, 2, 2, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    back = torch.arange(256).float().div(127.5).sub(1).view(1, 1, 16, 16).expand(3, 1, 16, 16)
    assert video.to_uint8(back)[0, :, :, 0].ravel().tolist() == list(range(256))


def test_contact_sheet(tmp_path, moving_square):
    path = video.contact_sheet(
        [moving_square, moving_square[:2]], tmp_path / "sheet.png", frames=4, labels=["a", "b"], scale=2
    )
    sheet = video.read_image(path)
    assert sheet.shape[1] >= 4 * 128
    assert sheet.shape[0] >= 2 * 96


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, moving_square, monkeypatch):
    """Closing a file that cannot be finished fails as well."""
    writer = VideoWriter(tmp_path / "a.mp4", 8)
    unfinished = writer._file.temporary
    monkeypatch.setattr(video, "_open_to_write", lambda path, named: av.open("/dev/full", "w", format="matroska"))
    writer.write(moving_square)
    with pytest.raises(OSError, match="No space left") as raised:
        writer.put_in_place()
    writer.discard()
    assert raised.value.filename == str(tmp_path / "a.mp4")
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("name", "fps", "crf", "said"),
    [
        ("a.mp4", True, 23, "fps True must be a number"),
        ("a.mp4", 1e-9, 23, "fps 1e-09 must be from 0.001"),
        ("a.mp4", 1e9, 23, "must be from 0.001"),
        ("a.mp4", 8, 99, "crf 99 must be a number from 0"),
        ("a.mp4", 8, float("nan"), "crf nan must be"),
        ("a.mp4", 8, "x", "crf 'x' must be"),
        ("a.png", 8, 23, "'.png' is the ending of no video file"),
        ("a.m3u8", 8, 23, "'.m3u8' is the ending of no video file"),
        ("a.mpd", 8, 23, "'.mpd' is the ending of no video file"),
        ("a.mp4", 8, True, "crf True must be"),
        ("", 8, 23, "is no name of a file"),
        (None, 8, 23, "None is no name of a file"),
    ],
)
def test_videos_that_cannot_be_written(tmp_path, moving_square, monkeypatch, name, fps, crf, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        video.save_video(moving_square, name, fps, crf)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.xyz", "a", "", None])
def test_pictures_that_cannot_be_written(moving_square, name):
    with pytest.raises(UserError, match="ending of no picture file|no name of a file"):
        video.save_image(moving_square[0], name)


WRONG_SHEETS = (
    *({"frames": 0}, {"columns": 0}, {"scale": 0}, {"labels": ["a", "b"]}),
    *({"frames": 1.5}, {"gap": -1}, {"scale": 10**6}, {"columns": 10**9}),
)


@pytest.mark.parametrize("wrong", WRONG_SHEETS)
def test_sheets_that_cannot_be_drawn(tmp_path, moving_square, wrong):
    with pytest.raises(UserError, match="a contact sheet of 1 videos"):
        video.contact_sheet([moving_square], tmp_path / "sheet.png", **wrong)


def test_labels_of_several_lines_are_drawn_in_one(tmp_path, moving_square):
    sheets = [video.contact_sheet([moving_square], tmp_path / f"{n}.png", labels=[f"a{n}b"]) for n in ("\n", " ")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_sizes_that_a_format_does_not_hold(tmp_path):
    wide = np.zeros((1, 2, 70_000, 3), np.uint8)
    with pytest.raises(UserError, match="a.mp4: frames of 70000 x 2 pixels"):
        video.save_video(wide, tmp_path / "a.mp4", 8)
    with pytest.raises(UserError, match=r"a.jpg: a picture of 70000 x 2 pixels .* give .png"):
        video.save_image(wide[0], tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a.png: a picture needs pixels"):
        video.save_image(wide[0, :0], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
