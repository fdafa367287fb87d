"""Longer clips are trained on in windows that go on from their own latents."""

from pathlib import Path

import pytest
import torch

from opensora.config import load_config
from opensora.config.commands import TrainOptions
from opensora.diffusion.conditions import condition_runs, head_condition
from opensora.diffusion.latents import pack
from opensora.encoded.memory import EncodedMemory
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.checks import check_config
from opensora.training.diffusion.inputs import InputEncoder, InputOptions, continued
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[3]
DATA = {"dataset.data_path": "clips.csv"}
LATENT_FRAMES = 5


@pytest.fixture(scope="module")
def encoders(tiny_config):
    torch.manual_seed(0)
    return [build_module(dict(tiny_config[k]), MODELS, torch_dtype=torch.float32) for k in ("ae", "t5", "clip")]


def numbered(batch):
    """Latents [batch, 1, 5, 1, 1] that are their own frame numbers, from 10 of the second sample and so on."""
    return (torch.arange(LATENT_FRAMES) + 10.0 * torch.arange(batch)[:, None]).view(batch, 1, LATENT_FRAMES, 1, 1)


def test_windows_begin_anywhere_after_the_first_latent():
    """The latents of a video's first frame stand for one frame, all others for four; no window goes on from that."""
    types, windows, cond = continued(numbered(200), 3, torch.Generator().manual_seed(0))
    assert set(types) == {"v2v_head"}
    begins = windows[:, 0, 0, 0, 0] % 10
    assert set(begins.tolist()) == {1.0, 2.0}
    assert torch.equal(windows[:, 0, :, 0, 0] - windows[:, 0, :1, 0, 0], torch.arange(3.0).expand(200, 3))
    given = cond[:, 0, :, 0, 0].sum(1)
    assert set(given.tolist()) == {1.0, 2.0}


def test_what_is_given_is_the_window_s_own_beginning():
    _, windows, cond = continued(numbered(50), 4, torch.Generator().manual_seed(1))
    for window, own in zip(windows, cond):
        frames = int(own[0, :, 0, 0].sum())
        assert torch.equal(own, head_condition(window[None], window[None, :, :frames])[0])


@pytest.mark.parametrize("kept", [False, True])
def test_long_clips_are_cut_and_short_ones_as_without_windows(encoders, kept):
    """As long as the window, or kept in memory or not; the same random numbers decide."""
    plain = InputOptions(condition_weights={"t2v": 1, "i2v_head": 1})
    cut = InputOptions(condition_weights={"t2v": 1, "i2v_head": 1}, window=9)
    video = torch.rand(3, 3, 17, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = {}
    for name, options in (("plain", plain), ("cut", cut)):
        encode = InputEncoder(*encoders, options, EncodedMemory() if kept else None)
        for frames in (9, 17):
            batch = {
                "video": video[:, :, :frames],
                "text": list("abc"),
                "index": [0, 1, 2],
                "size": [(frames, 32, 32)] * 3,
            }
            made[name, frames] = encode(batch, torch.Generator().manual_seed(3))
            if name == "cut":
                assert encode.latent_size(batch) == (3, 4, 4)
    for key, value in made["plain", 9]["inputs"].items():
        assert torch.equal(value, made["cut", 9]["inputs"][key])
    long = made["cut", 17]
    assert long["conditions"] == ["v2v_head"] * 3
    assert long["target"].shape == made["cut", 9]["target"].shape
    generator = torch.Generator().manual_seed(3)
    ae = encoders[0]
    _, _, cond = continued(ae.from_stored(ae.encode_stored(video), generator), 3, generator)
    assert torch.allclose(long["inputs"]["cond"], pack(cond, 2), atol=1e-5)


def test_long_clips_give_nothing_to_conditions(encoders):
    weights = {"i2v_head": 1, "frames": 1}
    assert condition_runs(weights, encoders[0], 9, 9) == condition_runs(weights, encoders[0], 9)
    assert condition_runs(weights, encoders[0], 17, 9) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 10}, r"window=10: this autoencoder takes 4k\+1 frames; use 9 or 13"),
        ({"window": 1}, "window=1: this autoencoder takes .*; use more"),
        ({"window": 17, "condition_config": None, "model.cond_embed": False}, "window: .*set condition_config"),
    ],
)
def test_windows_that_cannot_be(changes, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words):
        check_config(load_config(ROOT / "configs/diffusion/train/demo_cpu.py", TrainOptions, {**DATA, **changes}))
