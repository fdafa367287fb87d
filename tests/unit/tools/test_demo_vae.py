"""The measurement of autoencoders on clips of the demo."""

import numpy as np
import pytest

from opensora.config.keys import read_section
from opensora.config.registries import MODELS
from opensora.models.build import build_on_meta
from tools.demo.evaluate_vae import that_fits


@pytest.mark.parametrize(("kind", "length", "kept"), [("hunyuan_vae", 17, 17), ("dc_ae", 17, 16), ("dc_ae", 1, 1)])
def test_clips_are_cut_to_what_an_autoencoder_takes(kind, length, kept):
    clip = np.arange(length)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    cut = that_fits(clip, build_on_meta(read_section({"type": kind}, MODELS)))
    assert np.array_equal(cut, clip[:kept])
