"""The pictures that come with the repository, drawn by its own tools."""

import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from opensora.utils.errors import UserError
from opensora.utils.video import read_image
from tools.demo import draw_picture, pictures, record_page
from tools.demo.lighthouse import draw_lighthouse


def test_lighthouse():
    picture = draw_lighthouse(96, 160)
    assert picture.shape == (96, 160, 3)
    assert np.array_equal(picture, draw_lighthouse(96, 160)), "the same at every call"
    left, right = picture[10:50, 40:60].mean((0, 1)), picture[60:85, 130:155].mean((0, 1))
    assert left.mean() > right.mean() + 40, "sky over rock"


@pytest.mark.parametrize("scene", ["lighthouse", "shape"])
def test_script(tmp_path, monkeypatch, scene):
    monkeypatch.setattr(draw_picture, "draw_lighthouse", lambda: draw_lighthouse(96, 160))
    out = tmp_path / "a.png"
    monkeypatch.setattr(sys, "argv", ["draw_picture.py", "--scene", scene, "--out", str(out)])
    assert draw_picture.main() == 0
    assert read_image(out).shape == ((96, 160, 3) if scene == "lighthouse" else (64, 64, 3))


def test_a_picture_that_is_there_stays(tmp_path):
    out = tmp_path / "a.png"
    for _ in range(2):  # the same picture may be drawn twice
        draw_picture.main(["--out", str(out)])
    before = out.read_bytes()
    with pytest.raises(UserError, match="a.png exists and holds something else; give another name, or --overwrite"):
        draw_picture.main(["--out", str(out), "--color", "red"])
    assert out.read_bytes() == before
    draw_picture.main(["--out", str(out), "--color", "red", "--overwrite"])
    assert out.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{}"], "is no picture"),
        (["--out", "{}/a.txt"], "'.txt' is no picture"),
        (["--out", "{}/" + "x" * 300 + ".png"], "a name of 304 bytes"),
        (["--out", "{}/file.png/a.png"], "file.png is a file; give a folder"),
        (["--out", "{}/loop.png"], "is a link that leads nowhere"),
        (["--radius", "nan", "--out", "{}/a.png"], "--radius nan: expected 0 or more"),
        (["--x", "1e9", "--out", "{}/a.png"], "--x 1000000000.0: expected 64 or less"),
        (["--x", "1", "--out", "{}/a.png"], "it must be"),
    ],
)
def test_mistakes_are_named(tmp_path, words, message):
    (tmp_path / "file.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match=message):
        draw_picture.main([word.format(tmp_path) for word in words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png", "loop.png"]


def test_moving_pictures(tmp_path, monkeypatch):
    def videos(pipe):
        time = 20 * np.arange(3, dtype=np.uint8)[:, None, None, None]  # WebP merges frames that are equal
        still = np.zeros((3, 16, 16, 3), np.uint8)
        return [(f"prompt {i} of several words", still + np.uint8(80 * i) + time) for i in (1, 2)]

    monkeypatch.setattr(pictures, "MOVING", {"demo": videos})
    monkeypatch.setattr(pictures.VideoPipeline, "from_config", lambda path: None)
    pictures.main(["--only", "demo", "--out", str(tmp_path)])
    with Image.open(tmp_path / "demo.webp") as moving:
        assert moving.n_frames == 3
        moving.seek(1)
        shown = np.asarray(moving.convert("RGB")).astype(int)
        middle = shown.shape[0] // 2 + 5
        assert abs(shown[middle, shown.shape[1] // 4] - 100).max() < 8
        assert abs(shown[middle, 3 * shown.shape[1] // 4] - 180).max() < 8
    assert moving.info["loop"] == 0


def test_the_page_is_filmed_into_a_picture(tmp_path, monkeypatch):
    seen = [(Image.new("RGB", (32, 16), (0, 40 * i, 0)), 100 * i) for i in (1, 2, 3)]
    monkeypatch.setattr(pictures, "film", lambda config: seen)
    pictures.main(["--only", "page", "--out", str(tmp_path)])
    with Image.open(tmp_path / "page.webp") as moving:
        assert moving.n_frames == 3


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_a_long_film_is_shortened_evenly(count):
    kept = [number for number, _ in record_page._some([(number, 1) for number in range(count)])]
    assert len(kept) == min(count, record_page.MOST_STEPS)
    assert kept == sorted(set(kept))
    assert kept[-1] == count - 1
    steps = {after - before for before, after in itertools.pairwise(kept)}
    assert not steps or max(steps) - min(steps) <= 1


def test_sheets(tmp_path, monkeypatch):
    """Every picture of the documentation is one that the script makes, and small."""
    folder = pictures.ROOT / "docs" / "images"
    for name in pictures.SHEETS:
        assert (folder / f"{name}.png").stat().st_size < 150_000
    for name in (*pictures.MOVING, pictures.PAGE):
        assert (folder / f"{name}.webp").stat().st_size < 1_000_000

    def sheet(pipe):
        return [("a prompt", np.zeros((9, 16, 16, 3), np.uint8))]

    monkeypatch.setattr(pictures, "SHEETS", {"text_to_video": sheet})
    monkeypatch.setattr(pictures, "MOVING", {})
    monkeypatch.setattr(pictures, "film", lambda config: [(Image.new("RGB", (8, 8)), 100)])
    monkeypatch.setattr(pictures.VideoPipeline, "from_config", lambda path: None)
    pictures.main(["--out", str(tmp_path)])
    assert (tmp_path / "text_to_video.png").is_file()
    (tmp_path / "text_to_video.png").write_text("mine")
    with pytest.raises(UserError, match="exists and holds something else"):
        pictures.main(["--out", str(tmp_path)])
    assert (tmp_path / "text_to_video.png").read_text() == "mine"
