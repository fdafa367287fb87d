"""The pictures that come with the repository, drawn by its own tools."""

import sys

import numpy as np
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import read_image
from tools.demo import draw_picture, pictures
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


def test_sheets(tmp_path, monkeypatch):
    """Every picture of the documentation is one that the script makes, and small."""
    folder = pictures.ROOT / "docs" / "images"
    for name in pictures.SHEETS:
        assert (folder / f"{name}.png").stat().st_size < 150_000
        assert f"images/{name}.png" in (pictures.ROOT / "README.md").read_text()

    def sheet(pipe):
        return [("a prompt", np.zeros((9, 16, 16, 3), np.uint8))]

    monkeypatch.setattr(pictures, "SHEETS", {"text_to_video": sheet})
    monkeypatch.setattr(pictures.VideoPipeline, "from_config", lambda path: None)
    pictures.main(["--out", str(tmp_path)])
    assert (tmp_path / "text_to_video.png").is_file()
    (tmp_path / "text_to_video.png").write_text("mine")
    with pytest.raises(UserError, match="exists and holds something else"):
        pictures.main(["--out", str(tmp_path)])
    assert (tmp_path / "text_to_video.png").read_text() == "mine"
