"""The small model that comes with the repository does what the README says."""

from pathlib import Path

import pytest

from opensora.diffusion.pipeline import VideoPipeline
from opensora.utils.video import read_image
from tools.demo.analyse import analyse, psnr

ROOT = Path(__file__).parents[2]
STEPS = 16  # of 50: enough to see what is drawn


@pytest.fixture(scope="module")
def pipe():
    """The pipeline of the demo config, run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield VideoPipeline.from_config("configs/diffusion/inference/demo.py")


def test_a_video_follows_its_prompt(pipe):
    """In all its steps, and on a light background: `test_quality`."""
    result = pipe("a red circle moving right on a dark background", seed=42, num_steps=STEPS)
    (frames,) = result.frames
    seen = analyse(frames)
    assert frames.shape == (17, 64, 64, 3)
    assert (seen.color, seen.motion, seen.background) == ("red", "right", "dark")


def test_a_video_starts_from_its_picture(pipe):
    picture = ROOT / "assets" / "demo" / "blue_square.png"
    result = pipe("a blue square moving up", ref=str(picture), cond_type="i2v_head", seed=42, num_steps=STEPS)
    # The autoencoder itself reaches about 30 dB; a first frame that ignored the picture stays below 15.
    assert psnr(result.frames[0][:1], read_image(picture)[None]) > 22
    assert analyse(result.frames[0]).motion == "up"


def test_the_shipped_files_stay_small():
    size = sum(file.stat().st_size for file in (ROOT / "assets" / "demo").rglob("*") if file.is_file())
    assert size < 40e6
