"""A folder of videos to a table and a page; what records tell of given frames."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video
from tests.unit.tools.evaluate.test_measures import pan
from tools.evaluate.learned import VideoFeatures, frechet_distance
from tools.evaluate.references import borders
from tools.evaluate.samples import Sample, list_samples
from tools.evaluate.videos import main


class Mean(torch.nn.Module):
    """A network: the mean of each colour over a clip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos of one prompt as inference.py leaves them, the second from a picture; one of others; one damaged."""
    place = tmp_path / "videos"
    for index, name in enumerate(("cat_0000", "cat_0000_1", "dog-0")):
        save_video(pan((index + 1) * np.arange(6)), place / f"{name}.mp4", 8, crf=10)
    save_image(pan(np.zeros(1, int))[0], tmp_path / "start.png")
    record = {"prompt": "a cat", "seed": 3, "cond_type": "i2v_head", "references": str(tmp_path / "start.png")}
    (place / "cat_0000_1.json").write_text(json.dumps(record))
    (place / "cat_0000.json").write_text(json.dumps({"prompt": "a cat", "seed": 2, "cond_type": "t2v"}))
    (place / "broken.mp4").write_bytes(b"nothing")
    return place


def test_a_folder(folder, tmp_path, capsys):
    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    main([str(folder), "--out", str(tmp_path / "out"), "--script", f"mean={tmp_path / 'mean.pt'}"])
    table = pd.read_csv(tmp_path / "out" / "videos.csv").set_index("name")
    assert list(table["prompt"]) == ["broken", "a cat", "a cat", "dog"]
    assert isinstance(table["error"]["broken"], str)
    assert table["motion"]["dog-0"] > 1.5 * table["motion"]["cat_0000"]
    assert table["start_psnr"].dropna().index.tolist() == ["cat_0000_1"]
    assert table["start_psnr"]["cat_0000_1"] > 30
    assert table["diversity"].notna().sum() == 2  # a single video of a prompt has none
    assert table["mean"].between(-1, 1).sum() == 3
    page = (tmp_path / "out" / "videos.html").read_text()
    assert '<h2 id="motion">' in page
    assert page.count("data:image/jpeg;base64") > 10
    assert "http" not in page.replace("http-equiv", "")  # nothing from elsewhere
    assert "1 cannot be read: broken" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        main([str(folder), "--out", str(tmp_path / "out")])


def test_wrong_flags_are_told_at_once(folder, tmp_path):
    for flags, said in (
        (["--fvd", "x.pt"], "go together"),
        (["--aesthetic", "x.pth"], "give --clip too"),
        (["--script", "x.pt"], "NAME=FILE"),
        (["--script", "x=x.pt"], "no such file"),
        (["--clip", str(tmp_path)], "no model there"),
    ):
        with pytest.raises(UserError, match=said):
            main([str(folder), "--out", str(tmp_path / "out"), *flags])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no videos"):
        list_samples(tmp_path / "empty")


def test_where_given_frames_end():
    for frames, latent, cond_type, places in (
        (129, 33, "v2v_head", [33]),
        (128, 32, "v2v_head", [32]),  # an autoencoder that is not causal
        (129, 33, "v2v_tail", [96]),
        (129, 33, "i2v_head", []),
        (129, 33, "of_my_own", []),
    ):
        record = {"latent": [16, latent, 8, 8], "cond_type": cond_type}
        assert borders(Sample(Path("x.mp4"), "x", record), frames) == places


def test_frechet_distance_of_gaussians(tmp_path):
    """Against the closed form: equal covariances leave the squared distance of means; scaled ones (1 - s)^2 each."""
    rows = np.random.default_rng(0).normal(size=(400, 3))
    assert frechet_distance(list(rows), list(rows)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(list(rows), list(rows + np.array([2, 0, 0]))) == pytest.approx(4)
    spread = np.trace(np.cov(rows, rowvar=False))
    centred = rows - rows.mean(0)
    assert frechet_distance(list(centred), list(3 * centred)) == pytest.approx(4 * spread)
    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    feature = VideoFeatures(tmp_path / "mean.pt", "cpu")(np.full((3, 16, 16, 3), 255, np.uint8))
    assert feature == pytest.approx([1, 1, 1])
