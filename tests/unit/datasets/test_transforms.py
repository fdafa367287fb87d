"""How frames are fitted: as Open-Sora 2.0 fits them, clips and pictures each in their own way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opensora.datasets import transforms
from opensora.datasets.transforms import (
    TRANSFORMS,
    as_bytes,
    center,
    fit_frames,
    in_model_range,
    resize_crop,
    to_model_range,
)
from opensora.utils.errors import UserError

SIZES = [(20, 47), (47, 20), (33, 40), (64, 101), (101, 64), (37, 37), (83, 131), (40, 71)]


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def fill_clip(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """The original's rule for clips: one side fits, the other is cut at ``int(round(excess) / 2.0)``."""
    h, w = frames.shape[1:3]
    by_height = height / h > width / w
    size = (height, round(w * height / h)) if by_height else (round(h * width / w), width)
    scaled = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, size, mode="bilinear")
    top, left = (0, int((size[1] - width) / 2.0)) if by_height else (int((size[0] - height) / 2.0), 0)
    return scaled[..., top : top + height, left : left + width].permute(0, 2, 3, 1).numpy() * 255


def fill_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The original's rule for pictures: Pillow's bicubic, cut at ``int(round(excess / 2.0))``."""
    h, w = picture.shape[:2]
    by_height = height / h > width / w
    size = (height, round(w * height / h)) if by_height else (round(h * width / w), width)
    scaled = np.array(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
    top, left = (0, round((size[1] - width) / 2.0)) if by_height else (round((size[0] - height) / 2.0), 0)
    return scaled[top : top + height, left : left + width]


def centre_picture(picture: np.ndarray, side: int) -> np.ndarray:
    """The original's rule for squares of pictures: halved, scaled, cut at ``excess // 2``."""
    image = Image.fromarray(picture)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - side) // 2, (image.width - side) // 2
    return np.array(image)[top : top + side, left : left + side]


def levels(video: torch.Tensor) -> np.ndarray:
    return (video.permute(1, 2, 3, 0).numpy() + 1) * 127.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frames", [1, 3])
def test_clips_are_scaled_and_cut_as_clips_also_a_single_frame(size, frames):
    clip = noise(frames, *size)
    for target in ((20, 20), (16, 24), (24, 16), (33, 33)):
        found = levels(resize_crop(to_model_range(clip), *target, picture=False))
        np.testing.assert_allclose(found, fill_clip(clip, *target), atol=1e-3)
    if frames > 1:
        given = to_model_range(clip)
        assert torch.equal(resize_crop(given, 20, 20), resize_crop(given, 20, 20, picture=False))


@pytest.mark.parametrize("excess", range(1, 9))
def test_offsets(excess):
    ramp = np.broadcast_to(np.arange(20 + excess, dtype=np.uint8)[None, None, :, None], (2, 20, 20 + excess, 3))
    assert levels(resize_crop(to_model_range(ramp), 20, 20))[0, 0, 0, 0].round() == excess // 2
    assert levels(center(to_model_range(ramp), 20, 20))[0, 0, 0, 0].round() == round(excess / 2)
    one = to_model_range(ramp[:1])
    assert levels(resize_crop(one, 20, 20))[0, 0, 0, 0].round() == round(excess / 2)
    assert levels(center(one, 20, 20))[0, 0, 0, 0].round() == excess // 2


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_scaled_and_cut_as_pictures(size):
    picture = noise(1, *size)
    for target in ((20, 20), (16, 24), (24, 16)):
        found = levels(resize_crop(to_model_range(picture), *target))[0]
        assert np.abs(found - fill_picture(picture[0], *target)).mean() < 1.5  # Pillow rounds in between
        np.testing.assert_array_equal(found, levels(resize_crop(to_model_range(picture), *target, picture=True))[0])


@pytest.mark.parametrize("size", [*SIZES, (129, 131), (255, 301), (13 * 4, 61)])
@pytest.mark.parametrize("side", [13, 16, 20])
def test_squares_of_pictures(size, side):
    picture = noise(1, *size)
    found = levels(center(to_model_range(picture), side, side))[0]
    assert np.abs(found - centre_picture(picture[0], side)).mean() < 2.5  # Pillow rounds up at every halving
    with pytest.raises(UserError, match="makes squares"):
        center(to_model_range(picture), side, side + 1)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("picture", [True, False])
def test_frames_fitted_a_few_at_a_time_are_the_same_to_the_bit(name, picture, monkeypatch):
    """So that of a clip of 1080p only some frames are ever there as floats of that size."""
    frames, asked = noise(7, 50, 70), []

    def transform(video, *size):
        asked.append(video.shape[1])
        return TRANSFORMS[name](video, *size)

    whole = TRANSFORMS[name](to_model_range(frames), 24, 24, picture)
    for some, parts in ((3, [3, 3, 1]), (1, [1] * 7), (7, [7])):
        monkeypatch.setattr(transforms, "FLOATS_AT_ONCE", some * frames[0].size)
        assert torch.equal(fit_frames(frames, 24, 24, picture, transform), whole)
        assert asked == parts
        asked.clear()


def test_pixels_go_as_bytes_where_nothing_was_scaled_and_come_back_to_the_bit():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, axis=3)
    video = to_model_range(every)
    packed = as_bytes(video)
    assert packed.dtype == torch.uint8
    assert torch.equal(in_model_range(packed), video)
    scaled = fit_frames(noise(3, 40, 40), 24, 24)
    assert as_bytes(scaled) is scaled, "what scaling makes lies between bytes, as in the original"
    late = to_model_range(noise(3, 8, 8))
    late[:, 2] += 1e-6
    assert as_bytes(late) is late
    assert in_model_range(scaled) is scaled
