"""Pictures, from files and as a program holds them."""

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.utils.errors import UserError
from opensora.utils.media.kinds import kind_of
from opensora.utils.media.pictures import as_pixels, read_picture
from opensora.utils.media.probe import probe
from tests.unit.utils.media_files import scene

PICTURE = scene(1)[0]


def stored(orientation: int) -> np.ndarray:
    """:data:`PICTURE` as a camera stores it with an EXIF orientation: where its row 0 and column 0 are, says the
    standard."""
    upright = PICTURE
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "photo"
    options = {"lossless": True} if name == "WEBP" else {"quality": 95}
    Image.fromarray(np.ascontiguousarray(stored(orientation))).save(path, name, exif=exif, **options)
    assert kind_of(path) == "picture"
    pixels = read_picture(path)
    assert pixels.shape == PICTURE.shape
    assert np.abs(pixels.astype(int) - PICTURE).mean() < 6
    info = probe(path)
    assert (info.kind, info.num_frames, info.height, info.width) == ("picture", 1, *PICTURE.shape[:2])
    assert np.isnan(info.fps)


def test_damaged_exif_says_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(PICTURE).save(path, exif=exif)
    data = path.read_bytes()
    at = data.index(b"Exif") + 8
    for bad in (b"\xff" * 20, bytes(20)):
        path.write_bytes(data[:at] + bad + data[at + 20 :])
        assert read_picture(path).shape[:2] == (probe(path).height, probe(path).width) == PICTURE.shape[:2]


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_depths_and_modes(tmp_path, mode):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(4, axis=0).repeat(4, axis=1)
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(np.where(ramp < 128, 0, 255).astype(np.uint8)))
    elif mode == "CMYK":
        image = image.convert("RGB").convert(mode)
    else:
        image = image.convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path, compression="tiff_lzw" if path.suffix == ".tif" else None)
    expected = {"1": np.where(ramp < 128, 0, 255), "RGBA": np.where(ramp < 128, 255, ramp)}
    wanted = expected.get({"LA": "RGBA"}.get(mode, mode), ramp)
    error = np.abs(read_picture(path).astype(int) - wanted[..., None])
    assert error.mean() < (90 if mode == "1" else 2)  # one bit is dithered
    np.testing.assert_array_equal(as_pixels(image), read_picture(path))


def test_damaged_pictures_are_read_or_refused_by_name(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "PPM"):
        path = tmp_path / f"whole.{name}"
        Image.fromarray(PICTURE).save(path, name)
        data = path.read_bytes()
        for number in range(40):
            changed = bytearray(data[: int(rng.integers(1, len(data)))] if number % 2 else data)
            for place in rng.integers(0, min(len(changed), 200), number % 8):
                changed[place] = rng.integers(256)
            (tmp_path / "bad").write_bytes(changed)
            kind_of(tmp_path / "bad")
            for read in (read_picture, probe):
                try:
                    read(tmp_path / "bad")
                except UserError as error:
                    message = str(error)
                else:
                    continue
                assert str(tmp_path / "bad") in message


LAYOUTS = {
    "[H, W, 3]": (PICTURE, PICTURE),
    "[3, H, W]": (PICTURE.transpose(2, 0, 1), PICTURE),
    "[H, W]": (PICTURE[..., 1], PICTURE[..., 1:2].repeat(3, -1)),
    "[H, W, 1]": (PICTURE[..., 1:2], PICTURE[..., 1:2].repeat(3, -1)),
    "[1, H, W]": (PICTURE[None, ..., 1], PICTURE[..., 1:2].repeat(3, -1)),
    "[T, H, W, 3]": (scene(7), scene(7)),
    "[3, T, H, W]": (scene(7).transpose(3, 0, 1, 2), scene(7)),
    "[T, 3, H, W]": (scene(7).transpose(0, 3, 1, 2), scene(7)),
    "[T, H, W, 1]": (scene(7)[..., :1], scene(7)[..., :1].repeat(3, -1)),
}


@pytest.mark.parametrize("kind", ["uint8", "float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor", [False, True])
def test_arrays_and_tensors(layout, kind, tensor):
    given, expected = LAYOUTS[layout]
    if kind == "bfloat16" and not tensor:
        return
    value = torch.from_numpy(given.copy()) if tensor else given
    if kind != "uint8":
        value = (value / 255).to(getattr(torch, kind)) if tensor else (given / 255).astype(kind)
    found = as_pixels(value)
    assert (found.dtype, found.shape) == (np.uint8, expected.shape)
    assert np.abs(found.astype(int) - expected).max() <= (1 if kind == "bfloat16" else 0)


def test_transparency_of_arrays_is_laid_on_white():
    rgba = np.zeros((2, 4, 5, 4), np.float32)
    rgba[0, ..., 3] = 1
    found = as_pixels(rgba)
    assert (found[0] == 0).all()
    assert (found[1] == 255).all()


@pytest.mark.parametrize(
    "value",
    [
        PICTURE.astype(np.float32),
        PICTURE / 127.5 - 1,
        np.full((8, 8, 3), np.nan),
        PICTURE.astype(np.int64),
        PICTURE.astype(np.uint16) * 257,
        PICTURE > 100,
        np.zeros((3, 3, 8, 8), np.uint8),
        np.zeros((8, 9, 5), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros(7, np.uint8),
        np.zeros((1, 2, 8, 8, 3), np.uint8),
        np.array(["a"]),
        Image.fromarray(np.zeros((4, 4), np.float32)),
        7,
        b"bytes",
        {"a": 1},
        object(),
        torch.zeros(3, 8, 8).long(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_refused_by_name(value):
    with pytest.raises(UserError, match=r"^reference 2: .*(expected|without pixels|not a readable picture)"):
        as_pixels(value, "reference 2")
