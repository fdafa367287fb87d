"""The pictures that come with the repository, drawn by its own tools."""

import sys

import numpy as np
import pytest

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
