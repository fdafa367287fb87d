"""Sizes, lengths and steps of a run, from the config alone."""

import pytest

from opensora.config.commands import SamplingOption
from opensora.diffusion.plan import LatentSpec, image_plan, make_plan
from opensora.diffusion.wording import add_fps, final_text
from opensora.utils.errors import UserError

CAUSAL = LatentSpec((4, 8, 8), is_causal=True)
DEEP = LatentSpec((4, 32, 32), is_causal=False)
PICTURE = LatentSpec((1, 8, 8), is_causal=False)


def option(**changes) -> SamplingOption:
    released = {"resolution": "256px", "aspect_ratio": "16:9", "num_frames": 129, "guidance": 7.5, "guidance_img": 3.0}
    oscillating = {"text_osci": True, "image_osci": True, "scale_temporal_osci": True}
    return SamplingOption(**{**released, **oscillating, **changes})


def test_released_256px():
    plan = make_plan(option(), CAUSAL, patch_size=2)
    assert (plan.height, plan.width, plan.latent_size, plan.tokens) == (192, 336, (33, 24, 42), 8316)
    assert (plan.num_steps, plan.forwards) == (50, 80)
    assert make_plan(option(), CAUSAL, 2, "i2v_head").forwards == 110


def test_high_compression_768px():
    plan = make_plan(option(resolution="768px", num_frames=128), DEEP, patch_size=1, cond_type="i2v_head")
    assert (plan.height, plan.width, plan.latent_size, plan.tokens) == (576, 1024, (32, 18, 32), 18432)
    picture = image_plan(option(resolution="768px"), "768px", PICTURE, patch_size=2)
    assert (picture.height, picture.width) == (576, 1024), "the picture knows nothing of the video's compression"


@pytest.mark.parametrize(
    ("spec", "frames", "near"),
    [
        (CAUSAL, 18, "17 (or 21)"),
        (CAUSAL, 3, "5 (or 1)"),
        (CAUSAL, 0, "1"),
        (DEEP, 129, "128 (or 132)"),
        (DEEP, 2, "1 (or 4)"),
    ],
)
def test_lengths_that_cannot_be(spec, frames, near):
    with pytest.raises(UserError) as caught:
        spec.check_frames(frames)
    assert f"the nearest is {near}" in str(caught.value)


@pytest.mark.parametrize(("spec", "frames"), [(CAUSAL, 1), (CAUSAL, 129), (DEEP, 1), (DEEP, 128), (PICTURE, 1)])
def test_lengths_that_can(spec, frames):
    spec.check_frames(frames)


@pytest.mark.parametrize(
    ("cond_type", "is_causal_vae", "kept"),
    [
        ("t2v", False, slice(0, 128)),
        ("i2v_head", False, slice(3, 128)),
        ("i2v_tail", False, slice(0, 125)),
        ("i2v_loop", False, slice(3, 125)),
        ("i2v_head", True, slice(0, 128)),
        ("v2v_head", False, slice(0, 128)),
    ],
)
def test_repeated_frames_of_a_given_picture_are_left_out(cond_type, is_causal_vae, kept):
    plan = make_plan(option(num_frames=128, is_causal_vae=is_causal_vae), DEEP, 1, cond_type)
    assert plan.kept_frames() == kept
    assert make_plan(option(), CAUSAL, 2, cond_type).kept_frames() == slice(0, 129)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 64}, "height and width must be given together"),
        ({"aspect_ratio": None}, "resolution and aspect_ratio must be given together"),
        ({"aspect_ratio": None, "resolution": None}, "give resolution and aspect_ratio"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"flow_shift": 1e30}, "flow_shift=1e\\+30: the times of 50 steps coincide"),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(option(**changes), CAUSAL, 2)


def test_suffixes():
    assert add_fps("a cat", 24) == "a cat. 24 FPS."
    assert add_fps(" a cat. ", 24) == "a cat. 24 FPS."
    assert add_fps("a cat. 16 FPS.", 24) == "a cat. 16 FPS."
    assert final_text("a cat", 24, "4") == "a cat. 24 FPS. 4 motion score."
    assert final_text("", 24, None) == "24 FPS."
