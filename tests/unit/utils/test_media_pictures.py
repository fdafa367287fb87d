"""Pictures, from files and as a program holds them."""

import io
import struct
import zlib

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace
from PIL import Image, ImageCms

from opensora.utils.errors import UserError
from opensora.utils.media import hdr
from opensora.utils.media.kinds import kind_of
from opensora.utils.media.pictures import as_pixels, read_picture
from opensora.utils.media.probe import probe
from tests.unit.utils.media_files import scene
from tests.unit.utils.test_media_colours import to_signal

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


def display_p3() -> bytes:
    """An ICC profile of Display P3's primaries, gamma 2.2."""

    def numbers(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = (0.9642, 1.0, 0.8249)
    columns = {b"r": (0.51512, 0.2412, -0.00105), b"g": (0.29198, 0.69225, 0.04189), b"b": (0.1571, 0.06657, 0.78407)}
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78), b"cprt": b"text" + bytes(8)}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + numbers(*white)}
    tags |= {name + b"XYZ": b"XYZ " + bytes(4) + numbers(*column) for name, column in columns.items()}
    tags |= {name + b"TRC": b"curv" + bytes(4) + struct.pack(">IHH", 1, round(2.2 * 256), 0) for name in columns}
    place, index, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        index += name + struct.pack(">II", place + len(body), len(content))
        body += content
    head = bytes(4) + b"\2\x10\0\0mntrRGB XYZ ".rjust(20, b"\0") + bytes(12) + b"acsp" + bytes(28) + numbers(*white)
    whole = head.ljust(128, b"\0") + index + body
    return struct.pack(">I", len(whole)) + whole[4:]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF"])
def test_colours_are_those_of_the_icc_profile(tmp_path, name, mode):
    if (name, mode) == ("JPEG", "RGBA"):
        mode = "RGB"
    profile, srgb = display_p3(), ImageCms.createProfile("sRGB")
    image = Image.fromarray(PICTURE)
    stored = ImageCms.profileToProfile(image, srgb, ImageCms.ImageCmsProfile(io.BytesIO(profile)), outputMode="RGB")
    assert np.abs(np.asarray(stored).astype(int) - PICTURE).mean() > 8
    expected = PICTURE.copy()
    if mode == "RGBA":
        stored.putalpha(255)
        stored.paste((0, 0, 0, 0), (0, 0, 160, 20))
        expected[:20] = 255
    elif mode == "P" and name == "PNG":
        stored = stored.convert("P", palette=Image.Palette.ADAPTIVE)
    stored.save(tmp_path / "a", name, icc_profile=profile, **({"quality": 98} if name == "JPEG" else {}))
    assert np.abs(read_picture(tmp_path / "a").astype(int) - expected).mean() < (3 if name == "JPEG" else 0.5)
    image.save(tmp_path / "a", "PNG", icc_profile=b"junk" * 40)
    np.testing.assert_array_equal(read_picture(tmp_path / "a"), PICTURE)
    image.save(tmp_path / "a", "PNG", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes())
    np.testing.assert_array_equal(read_picture(tmp_path / "a"), PICTURE)


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG, 1])
def test_pictures_of_high_dynamic_range_and_wide_gamut_are_mapped(tmp_path, transfer):
    Image.fromarray((to_signal(PICTURE, transfer) >> 8).astype(np.uint8)).save(tmp_path / "a.png")
    data, chunk = (tmp_path / "a.png").read_bytes(), b"cICP" + bytes([hdr.BT2020, transfer, 0, 1])
    named = data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    (tmp_path / "a.png").write_bytes(named)
    found = read_picture(tmp_path / "a.png").astype(int)
    assert np.abs(found - PICTURE).mean() < 5  # 24 and more as it is stored
    with av.open(str(tmp_path / "a.avif"), "w", format="avif") as target:
        stream = target.add_stream("libsvtav1", rate=1)
        stream.height, stream.width, stream.pix_fmt = *PICTURE.shape[:2], "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        frame = av.VideoFrame.from_ndarray(to_signal(PICTURE, transfer), format="rgb48le")
        frame = frame.reformat(format="yuv420p10le", dst_colorspace=Colorspace.BT2020, dst_color_range=1)
        target.mux([*stream.encode(frame), *stream.encode()])
    assert np.abs(read_picture(tmp_path / "a.avif").astype(int) - PICTURE).mean() < 14


def test_documents_with_pictures_in_them_are_no_clips(tmp_path):
    image = Image.fromarray(PICTURE)
    for name in ("PDF", "ICO"):
        image.save(tmp_path / "a", name)
        assert kind_of(tmp_path / "a") is None
        for read in (probe, read_picture):
            with pytest.raises(UserError, match=str(tmp_path / "a")):
                read(tmp_path / "a")


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


def test_numbers_of_unknown_white_are_refused(tmp_path):
    """Where 255 is white, the upper 8 of 16 bits would be black."""
    for name, kind in (("whole", np.int32), ("fractions", np.float32)):
        path = tmp_path / f"{name}.tif"
        given = Image.fromarray(PICTURE[..., 0].astype(kind))
        with pytest.raises(UserError, match="save it with 8 or 16 bits"):
            as_pixels(given)
        given.save(path)
        with pytest.raises(UserError, match=rf"{name}.tif .*save it with 8 or 16 bits"):
            read_picture(path)


def test_values_that_rounding_took_over_the_edge_are_white_and_black():
    picture = np.array([[[1 + 1e-7, -1e-7, 0.5]]])
    assert as_pixels(picture).tolist() == [[[255, 0, 128]]]
    for far in (picture * 1.01, picture - 0.01):
        with pytest.raises(UserError, match="values from"):
            as_pixels(far)
    assert as_pixels(np.asmatrix(PICTURE[..., 0])).shape == PICTURE.shape


LAYOUTS = {
    "[H, W, 3]": (PICTURE, PICTURE),
    "[3, H, W]": (PICTURE.transpose(2, 0, 1), PICTURE),
    "[H, W]": (PICTURE[..., 1], PICTURE[..., 1:2].repeat(3, -1)),
    "[H, W, 1]": (PICTURE[..., 1:2], PICTURE[..., 1:2].repeat(3, -1)),
    "[1, H, W]": (PICTURE[None, ..., 1], PICTURE[..., 1:2].repeat(3, -1)),
    "[T, H, W, 3]": (scene(7), scene(7)),
    "[3, T, H, W]": (scene(7).transpose(3, 0, 1, 2), scene(7)),
    "[T, 3, H, W]": (scene(7).transpose(0, 3, 1, 2), scene(7)),
    "[1, 3, H, W]": (scene(1).transpose(0, 3, 1, 2), scene(1)),
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
        torch.zeros(3, 8, 8, device="meta"),
        torch.zeros(8, 8, 3).to_sparse(),
        torch.zeros(3, 8, 8).long(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_refused_by_name(value):
    with pytest.raises(UserError, match=r"^reference 2: .*(expected|without pixels|not a readable picture)"):
        as_pixels(value, "reference 2")
