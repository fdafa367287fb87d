"""Previews: a map that fits the demo's autoencoder, estimates of what latents become."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.models.autoencoder import as_autoencoder
from opensora.models.build import build_ready
from opensora.serving.preview import ColourMap, Denoised, drawn_clips, write_preview, write_sheet, write_thumbnail

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo():
    cfg = load_config("configs/diffusion/inference/demo.py", InferenceOptions)
    return as_autoencoder(build_ready(cfg.ae, CPU, torch.float32, "ae"))


def seen_share(colours, pairs):
    """Share of the variance of clips that the map sees in their latents."""
    seen = torch.stack([torch.from_numpy(colours(latents)).movedim(-1, 0) / 127.5 - 1 for latents, _ in pairs])
    small = torch.stack([F.adaptive_avg_pool3d(clip[None], tuple(latents.shape[1:]))[0] for latents, clip in pairs])
    return float(1 - (seen - small).square().mean() / small.var())


def test_the_map_shows_what_is_encoded_and_gets_better(demo):
    colours = ColourMap.of(demo, CPU, torch.float32)
    clips = drawn_clips(9, 64, 64, seed=1)[:12]
    pairs = [(demo.encode(clip[None], sample_posterior=False)[0], clip) for clip in clips]
    before = seen_share(colours, pairs)
    assert before > 0.7
    for pair in pairs:
        colours.show(*pair)
    assert seen_share(colours, pairs) > before


def test_what_is_shown_is_learnt_whatever_the_autoencoder():
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 4, generator=random) / 6
    colours = ColourMap(4)
    for _ in range(3):
        latents = torch.randn(4, 3, 6, 8, generator=random)
        small = torch.einsum("rc,cthw->rthw", matrix, latents)
        colours.show(latents, F.interpolate(small, scale_factor=8, mode="nearest"))
    seen = torch.from_numpy(colours(latents)).movedim(-1, 0) / 127.5 - 1
    torch.testing.assert_close(seen, small.clamp(-1, 1), atol=0.02, rtol=0)  # levels of 8 bits


def test_without_a_map_latents_are_shown_all_the_same():
    seen = ColourMap(2)(torch.randn(2, 3, 4, 5) * 7)
    assert (seen.shape, seen.dtype) == ((3, 4, 5, 3), np.uint8)
    assert 20 < seen.std() < 120


def test_the_estimate_is_exact_along_a_straight_path():
    times = [1.0, 0.7, 0.4, 0.0]
    end, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    states = [(1 - time) * end + time * noise for time in times]
    denoised = Denoised(times)
    assert denoised(1, 3, states[1]) is states[1]  # nothing is known yet
    for step in (2, 3):
        torch.testing.assert_close(denoised(step, 3, states[step]), end, atol=1e-5, rtol=0)
    assert denoised(1, 6, states[1]) is states[1]  # steps of a picture that comes first


def test_pictures_are_written_whole(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)
    moving = Image.open(write_preview(torch.randn(4, 3, 6, 8), ColourMap(4), tmp_path / "a.webp"))
    assert (moving.n_frames, moving.size) == (3, (192, 144))
    assert Image.open(write_thumbnail(frames, tmp_path / "b.webp")).size == (64, 48)
    assert Image.open(write_sheet(frames, tmp_path / "c.jpg")).size == (256, 144)
