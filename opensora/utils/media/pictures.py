"""Pictures, and pixels that a program holds, as uint8 RGB."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from opensora.utils.errors import UserError, first_line
from opensora.utils.media.hdr import needs_mapping
from opensora.utils.media.kinds import open_picture
from opensora.utils.media.pixels import on_white
from opensora.utils.media.profiles import in_srgb, mapped, named_colours
from opensora.utils.paths import is_file

EXIF_ORIENTATION = 0x112
LYING = (5, 6, 7, 8)  # orientations with rows and columns exchanged
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"adobe:ns:meta")
MOST_8_BITS, MOST_16_BITS = 2**8 - 1, 2**16 - 1
MODES_OF_16_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
OVERSHOOT = 1e-3  # of values from 0 to 1 that were computed: a quarter of a level
EXPECTED = (
    "expected pixels [H, W, 3] or [T, H, W, 3] (gray, RGBA and channels first as well), uint8 from 0 to 255 or floats "
    "from 0 to 1"
)


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """Read a picture as upright uint8 RGB [H, W, 3]; see :func:`picture_pixels`.

    Raises:
        UserError: the file is missing, is not a picture, or holds numbers whose white nobody knows (fractions, or 32
            bits that are not a picture's of 16).
    """
    if not is_file(path):
        raise UserError(f"image not found: {path}")
    with open_picture(path) as image:
        image.load()
        transfer, primaries = named_colours(path)
        if not needs_mapping(transfer, primaries):
            return picture_pixels(image)
        image.info.pop("icc_profile", None)  # the names count first
        return mapped(picture_pixels(image), transfer, primaries)


def picture_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 RGB [H, W, 3] of a picture: turned as its EXIF orientation says, in sRGB by its ICC profile, transparency
    laid on white, of 16 bits the upper 8.

    Raises:
        ValueError: floating-point values, or whole numbers of 32 bits that are not those of 16.
    """
    is_wide = image.format in ("TIFF", None)  # other formats have "I" for 16 bits
    image = in_srgb(_upright(image))
    if image.mode == "F":
        raise ValueError("floating-point values; save it with 8 or 16 bits")
    if image.mode == "I" and is_wide and not MOST_8_BITS < (np.asarray(image).max() or MOST_16_BITS) <= MOST_16_BITS:
        raise ValueError("whole numbers of 32 bits that are not those of 16; save it with 8 or 16 bits")
    if image.mode in MODES_OF_16_BITS:  # which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, MOST_16_BITS) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing; Pillow's parser raises errors of many types
        return image


def is_lying(path: str | Path, name: str) -> bool:
    """Whether the rows of a picture are shown as columns, as its metadata say; ``name`` is Pillow's of its format."""
    if name == "TIFF":  # which Pillow turns itself
        return False
    if name == "PNG":  # where Pillow decodes everything to look for what may stand at the end
        content = Path(path).read_bytes()
        if not any(mark in content for mark in PNG_EXIF):
            return False
    with open_picture(path) as image:
        try:
            return image.getexif().get(EXIF_ORIENTATION) in LYING
        except Exception:  # as in _upright
            return False


def as_pixels(value: Any, name: str = "the given pixels") -> NDArray[np.uint8]:
    """Pixels that a program holds as uint8 RGB.

    Args:
        value: a Pillow picture; or an array or tensor of a picture ([H, W], [H, W, C] or [C, H, W]) or a clip
            ([T, H, W, C], [C, T, H, W] or [T, C, H, W]) with 1 (gray), 3 or 4 (transparency, laid on white) channels,
            uint8 or floating from 0 to 1.
        name: what to call it in messages.

    Returns:
        [H, W, 3], or [T, H, W, 3] for a clip.

    Raises:
        UserError: anything else; says what was given and what is expected.
    """
    if isinstance(value, Image.Image):
        try:
            return picture_pixels(value)
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: not a readable picture ({error})") from error
    array = _array(value, name)
    array = _channels_last(_levels(array, name), name)
    if 0 in array.shape:
        raise UserError(f"{name}: an array {list(array.shape)} without pixels")
    if array.shape[-1] == 4:
        array = on_white(array)
    return np.ascontiguousarray(np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array)


def _array(value: Any, name: str) -> NDArray[Any]:
    """An array of an array or of a torch tensor (known by its methods: torch need not be imported for pictures)."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        try:
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        except (TypeError, ValueError, RuntimeError) as error:  # a sparse or quantised one, one without memory
            raise UserError(f"{name}: a tensor without pixels ({first_line(error)}); {EXPECTED}") from error
    if isinstance(value, np.matrix):  # stays of two dimensions whatever is done to it
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        raise UserError(f"{name}: {type(value).__name__} is no picture; {EXPECTED}")
    return value


def _levels(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{name}: {array.dtype} {list(array.shape)}; {EXPECTED}")
    least, most = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (least >= -OVERSHOOT and most <= 1.0 + OVERSHOOT):
        raise UserError(f"{name}: {array.dtype} values from {least:g} to {most:g}; {EXPECTED}")
    return np.round(array * 255.0).clip(0, 255).astype(np.uint8)


def _channels_last(array: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """[H, W, C] or [T, H, W, C] of whatever order."""
    if array.ndim == 2:
        return array[..., None]
    channels = [axis for axis in range(array.ndim) if array.shape[axis] in (1, 3, 4)]
    if array.ndim in (3, 4) and array.ndim - 1 in channels:
        return array
    first = [axis for axis in channels if axis < array.ndim - 2]
    if first == [0, 1] and array.shape[0] == 1:  # a batch of one picture, rather than a gray clip of three frames
        first = [1]
    if array.ndim not in (3, 4) or len(first) != 1:
        raise UserError(f"{name}: {array.dtype} {list(array.shape)}; {EXPECTED}")
    return np.moveaxis(array, first[0], -1)
