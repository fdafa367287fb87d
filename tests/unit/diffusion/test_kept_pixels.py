"""What is kept of a region comes back as the autoencoder's own round trip, whatever is made beside it."""

import numpy as np
import pytest
import torch

from opensora.config.commands import InferenceOptions
from opensora.config.load import load_config
from opensora.diffusion.decode import Gathered
from opensora.diffusion.free import PlacedLatents
from opensora.diffusion.kept_pixels import KeptPixels, KeptRegion
from opensora.diffusion.pipeline import VideoPipeline
from opensora.generation import decode_files as decode_file_module
from opensora.generation.decode_files import decode_files, read_kept
from opensora.generation.run import generate
from opensora.utils.video import save_image, save_video

LEFT = np.repeat([[True, True, False, False]], 4, 0)[None]  # of 4 x 4 latents


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return VideoPipeline.from_config(tiny_config, num_steps=1, num_frames=9)


@pytest.fixture(scope="module")
def made(pipe):
    """A region's video of noise, which decoders turn into something else than the reference's beside the border."""
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, :20] = 255  # two columns of latents, and half of a third
    return pipe("x", ref=[np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8), mask],
                cond_type="region", seed=1)  # fmt: skip


def test_kept_pixels_are_the_round_trip_and_all_others_stay(pipe, made):
    (kept,) = made.kept
    (trip,) = pipe.decode(kept.latents[None], made.plan)
    (plain,) = pipe.decode(made.latents, made.plan)
    (video,) = made.frames
    assert not np.array_equal(plain[:, :, :8], trip[:, :, :8])  # kept latents do not do it
    assert np.array_equal(video[:, :, :15], trip[:, :, :15])
    assert np.array_equal(video[:, :, 16:], plain[:, :, 16:])
    mixed = np.rint(plain[:, :, 15] + np.float32(1 / 3) * (trip[:, :, 15].astype(np.float32) - plain[:, :, 15]))
    assert np.abs(video[:, :, 15] - mixed).max() <= 1  # of 255: rounding
    assert np.array_equal(pipe.decode(made.latents, made.plan, made.kept)[0], video)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_moving_mask_is_followed_and_the_picture_border_is_none(pipe, is_causal, monkeypatch):
    ae = pipe.models["ae"]
    monkeypatch.setattr(type(ae), "is_causal", is_causal)
    cells = torch.from_numpy(np.concatenate([LEFT, ~LEFT, LEFT | True]))
    weights = KeptRegion(torch.zeros(4, 3, 4, 4), cells).weights(ae)
    first = 1 if is_causal else 4
    assert weights.shape == (first + 8, 32, 32)
    assert weights[:first, :, :15].eq(1).all()
    assert weights[:first, :, 16:].eq(0).all()
    assert weights[first : first + 4, :, 17:].eq(1).all()
    assert weights[first : first + 4, :, :16].eq(0).all()
    assert weights[first + 4 :].eq(1).all()


def test_only_samples_with_a_region_are_touched_part_by_part():
    gathered = Gathered()
    sink = KeptPixels(gathered, {1: (np.full((4, 2, 2, 3), 9, np.uint8), np.ones((4, 2, 2, 1), np.float32))})
    for sample in (0, 1):
        for _ in range(2):  # tried again in smaller tiles
            sink.start(sample)
            sink.write(np.zeros((3, 2, 2, 3), np.uint8))
        sink.write(np.zeros((1, 2, 2, 3), np.uint8))
    first, second = gathered.videos()
    assert (first.mean(), second.mean(), len(first), len(second)) == (0, 9, 4, 4)
    assert KeptRegion.of(None) is KeptRegion.of([torch.zeros(1)]) is KeptRegion.of(PlacedLatents((), [])) is None


def test_kept_latents_of_a_file_are_decoded_with_their_region(tiny_config, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    save_video(rng.integers(0, 255, (9, 32, 32, 3), np.uint8), tmp_path / "a.mp4", 8)
    save_image(np.repeat(np.uint8([[[0] * 3] * 16 + [[255] * 3] * 16]), 32, 0), tmp_path / "m.png")
    settings = {"save_dir": str(tmp_path), "num_steps": 1, "save_latents": True, "overwrite": True, "seed": 3}
    settings |= {"cond_type": "region", "ref": str(tmp_path / "a.mp4"), "mask": str(tmp_path / "m.png")}
    cfg = load_config({**tiny_config, "prompt": "a"}, InferenceOptions, settings)
    (made,) = generate(cfg, torch.device("cpu"), log=lambda line: None)
    content, latents = made.read_bytes(), made.with_suffix(".latents.safetensors")
    kept = read_kept(latents)
    assert kept is not None
    assert kept.cells[0, :, 2:].all()
    ae = VideoPipeline.from_config(cfg).models["ae"]  # of random weights, the same
    monkeypatch.setattr(decode_file_module, "build_ready", lambda *given: ae)
    (again,) = decode_files(cfg, [latents], torch.device("cpu"), log=lambda line: None)
    assert again.read_bytes() == content
