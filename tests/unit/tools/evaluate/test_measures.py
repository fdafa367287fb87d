"""Measures without weights: each tells a clip with its fault from the same clip without it."""

import numpy as np
import pytest
from scipy import ndimage

from tools.evaluate.measures import (
    MEASURES,
    blockiness,
    colourfulness,
    diversity,
    duplicates,
    frame_changes,
    frozen,
    join,
    jump,
    measure_clip,
    seam,
    sharpness,
    thumbnails,
)

H, W, T = 48, 64, 9


def world(seed: int = 0) -> np.ndarray:
    """A large soft picture to move over."""
    noise = np.random.default_rng(seed).normal(0, 1, (H + 40, W + 60, 3))
    soft = ndimage.gaussian_filter(noise, (2, 2, 0))
    return (soft - soft.min()) / (soft.max() - soft.min()) * 255


def pan(offsets: np.ndarray) -> np.ndarray:
    """A clip of the world seen from so many px further right in each frame."""
    picture = world()
    return np.stack([np.rint(picture[:H, x : x + W]).astype(np.uint8) for x in offsets])


@pytest.fixture(scope="module")
def even() -> tuple[np.ndarray, dict[str, float]]:
    clip = pan(2 * np.arange(T))
    return clip, measure_clip(clip, 8.0)


def test_even_motion(even):
    _, found = even
    assert found["motion"] == pytest.approx(2 * 8 / W, rel=0.1)  # 2 px a frame, 8 frames a second
    assert found["jerk"] < 0.1
    assert found["flicker"] < 2  # of a clip that changes by far more from frame to frame
    assert found["duplicates"] == found["frozen"] == 0
    assert set(found) < set(MEASURES)


def test_trembling_is_jerk(even):
    shaken = measure_clip(pan(2 * np.arange(T) + 2 * (np.arange(T) % 2)), 8.0)
    assert shaken["jerk"] > 10 * even[1]["jerk"] + 0.5


def test_light_that_flickers(even):
    clip, found = even
    levels = np.where(np.arange(T) % 2, 12, 0)[:, None, None, None]
    lit = measure_clip(np.clip(clip.astype(int) + levels, 0, 255).astype(np.uint8), 8.0)
    assert lit["flicker"] > found["flicker"] + 5
    assert lit["brightness_flicker"] > 20 > 5 > found["brightness_flicker"]


def test_blur_and_blocks(even):
    clip, _ = even
    assert sharpness(ndimage.gaussian_filter(clip, (0, 2, 2, 0))) < sharpness(clip) - 0.1
    blocks = clip.reshape(T, H // 8, 8, W // 8, 8, 3).mean((2, 4))
    blocky = np.repeat(np.repeat(blocks, 8, 1), 8, 2).astype(np.uint8)
    assert blockiness(clip) == pytest.approx(1, abs=0.1)
    assert blockiness(blocky) > 10
    assert blockiness(np.full((2, H, W, 3), 90, np.uint8)) == 1


@pytest.mark.parametrize(("axis", "place", "name"), [(2, 24, "x=24"), (2, 29, "x=29"), (1, 16, "y=16")])
def test_a_faint_seam_is_found(even, axis, place, name):
    clip, found = even
    assert found["seam"] < 0.35
    tiles = clip.astype(int)
    np.moveaxis(tiles, axis, 0)[place:] += 3  # of 255 levels
    value, where = seam(np.clip(tiles, 0, 255).astype(np.uint8))
    assert where == name
    assert value > 0.5


def test_colours(even):
    clip, _ = even
    grey = np.repeat(clip.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    assert colourfulness(grey) == 0
    assert colourfulness(clip) > 20


def test_frames_that_stand_still(even):
    clip = even[0].copy()
    clip[4:7] = clip[3]
    changes = frame_changes(clip)
    assert duplicates(clip) == frozen(changes) == 3 / 8
    clip[5, 0, 0] += 1  # not the same frame, but nothing that could be seen
    assert duplicates(clip) == 1 / 8
    assert frozen(frame_changes(clip)) == 3 / 8


def test_cuts_and_joins(even):
    changes = frame_changes(even[0])
    assert jump(changes) < 1.3
    cut = frame_changes(np.concatenate([even[0], 255 - even[0]]))
    assert jump(cut) > 2
    assert join(cut, T) == pytest.approx(jump(cut), rel=0.1)  # frame 9 is the first of the second half
    assert join(cut, 4) == pytest.approx(1, abs=0.2)


def test_diversity_of_a_prompt(even):
    small = [thumbnails(even[0]), thumbnails(even[0]), thumbnails(255 - even[0])]
    same, again, other = diversity(small)
    assert same == again < other
    assert np.isnan(diversity(small[:1])).all()


def test_pictures_and_shortest_clips():
    picture = measure_clip(world()[None, :H, :W].astype(np.uint8), float("nan"))
    assert set(picture) == {"sharpness", "blockiness", "colourfulness", "seam"}
    short = measure_clip(pan(np.arange(2)), 8.0)
    assert np.isnan(short["jerk"])
    assert np.isfinite(short["motion"])
