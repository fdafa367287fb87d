"""``import opensora``: light, and it has the names that programs start from."""

import subprocess
import sys
from pathlib import Path

import pytest

import opensora
from opensora.diffusion.pipeline import VideoPipeline
from opensora.utils.video import save_video

ROOT = Path(__file__).parents[2]


def test_names():
    assert (opensora.VideoPipeline, opensora.save_video) == (VideoPipeline, save_video)
    assert set(opensora.__all__) <= set(dir(opensora))
    assert all(getattr(opensora, name).__module__.startswith("opensora.") for name in opensora.__all__)
    with pytest.raises(AttributeError, match="module 'opensora' has no attribute 'VideoPipelin'"):
        opensora.VideoPipelin  # noqa: B018


def test_the_import_is_light():
    heavy = ("torch", "numpy", "mmengine", "transformers", "av")
    code = f"import sys, opensora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
