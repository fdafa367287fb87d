"""Sizes behind resolution and aspect-ratio names."""

import pytest

from opensora.datasets.aspect import (
    aspect_ratio_table,
    closest_aspect_ratio,
    get_image_size,
    num_pixels,
    resolution_table,
)
from opensora.utils.errors import UserError

LANDSCAPE = ("2.39:1", "2:1", "16:9", "1.85:1", "8:5", "3:2", "4:3", "1:1")
TRAINING = {
    (256, 16): "160x400 176x368 192x336 208x320 224x288 256x256",
    (512, 16): "336x784 368x720 384x688 400x656 416x624 448x592 512x512",
    (768, 16): "496x1184 544x1088 576x1024 560x1056 592x992 624x944 672x880 768x768",
    (1024, 16): "672x1568 720x1456 768x1360 752x1392 800x1312 832x1264 896x1168 1024x1024",
    (768, 32): "480x1216 544x1088 576x1024 640x928 672x864 768x768",
    (256, 32): "160x416 192x352 224x288 256x256",
}
INFERENCE = {
    (256, 16): "160x384 176x352 192x336 192x336 192x336 208x304 224x288 256x256",
    (768, 16): "496x1184 544x1072 576x1024 560x1040 592x992 624x928 656x880 768x768",
    (512, 16): "320x784 352x720 384x672 368x688 400x640 416x624 448x576 512x512",
    (1024, 16): "656x1568 720x1440 768x1360 752x1392 800x1296 832x1248 896x1168 1024x1024",
    (768, 32): "480x1184 544x1056 576x1024 576x1024 576x1024 608x928 672x864 768x768",
    (256, 32): "160x384 160x352 192x320 192x320 192x320 224x288 224x288 256x256",
}


def sizes(text: str) -> list[tuple[int, int]]:
    return [tuple(map(int, pair.split("x"))) for pair in text.split()]


@pytest.mark.parametrize("key", TRAINING)
def test_training_tables(key):
    expected = sizes(TRAINING[key])
    table = aspect_ratio_table(key[0] ** 2, key[1], training=True)
    assert sorted(table.values()) == sorted({*expected, *((w, h) for h, w in expected)})


@pytest.mark.parametrize("key", INFERENCE)
def test_inference_tables(key):
    table = aspect_ratio_table(key[0] ** 2, key[1])
    assert len(table) == 15
    if key != (256, 32):
        assert [table[ratio] for ratio in LANDSCAPE] == sizes(INFERENCE[key])
    assert set(table.values()) == {*sizes(INFERENCE[key]), *((w, h) for h, w in sizes(INFERENCE[key]))}
    assert all(table[":".join(ratio.split(":")[::-1])] == size[::-1] for ratio, size in table.items())


@pytest.mark.parametrize(
    ("name", "ratio", "size"),
    [
        ("256px", "16:9", (192, 336)),
        ("256px", "1:1", (256, 256)),
        ("768px", "16:9", (576, 1024)),
        ("768px", "9:16", (1024, 576)),
        ("1024px", "1:1", (1024, 1024)),
        ("64px", "1:1", (64, 64)),
    ],
)
def test_named_sizes(name, ratio, size):
    assert get_image_size(name, ratio) == size


@pytest.mark.parametrize("resolution", ["256px", "512px", "768px"])
def test_training_size_of_every_name_is_in_the_table(resolution):
    table = resolution_table(resolution)[1]
    for ratio in aspect_ratio_table(num_pixels(resolution)):
        assert get_image_size(resolution, ratio, training=True) in table.values()
    for ratio, size in table.items():
        assert get_image_size(resolution, ratio, training=True) == size


def test_pixels():
    assert num_pixels("256px") == 65536
    assert num_pixels("360p") == 230400


def test_suffixes():
    assert resolution_table("256px_ar1:1") == (65536, {"1:1": (256, 256)})
    assert resolution_table("256px_max") == (65536, {"3:2": (208, 320)})


def test_closest():
    table = aspect_ratio_table(256**2)
    assert closest_aspect_ratio(1080, 1920, table) == "16:9"
    assert closest_aspect_ratio(1920, 1080, table) == "9:16"
    assert closest_aspect_ratio(500, 500, table) == "1:1"


@pytest.mark.parametrize("name", ["256", "px", "0px", "256PX", "256px_foo", "big"])
def test_unknown_resolution(name):
    with pytest.raises(UserError, match="unknown resolution"):
        resolution_table(name)


def test_unknown_ratio_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"unknown aspect_ratio '7:3' .*16:9.*1:1"):
        get_image_size("256px", "7:3")
    with pytest.raises(UserError, match="too small"):
        get_image_size("8px", "1:1")
