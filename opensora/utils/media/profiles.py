"""Colours of pictures: an ICC profile, or names as clips have them, to what is shown as BT.709 (sRGB)."""

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from opensora.utils.media import hdr

NAMES_BYTES = 2**16  # of a file, before the pixels
# PNG's chunk cICP (a byte each), AVIF's box colr/nclx (two bytes each): primaries, transfer function
NAMES = (re.compile(rb"^\x89PNG.*?cICP(.)(.)", re.DOTALL), re.compile(rb"ftypavi[fs].*?colrnclx\0(.)\0(.)", re.DOTALL))
ALPHA = {"RGBA": "RGB", "LA": "L", "RGBa": "RGB", "La": "L"}
PROFILED = ("RGB", "L", "CMYK")


def named_colours(path: str | Path) -> tuple[int, int]:
    """Transfer function and primaries that a picture names in the numbers of ISO/IEC 23091-2, 1 (BT.709) where it has
    none."""
    with Path(path).open("rb") as file:
        head = file.read(NAMES_BYTES)
    for names in NAMES:
        if found := names.search(head):
            return found[2][0], found[1][0]
    return 1, 1


def mapped(pixels: NDArray[np.uint8], transfer: int, primaries: int) -> NDArray[np.uint8]:
    """uint8 ``[H, W, 3]`` of high dynamic range or wide gamut as clips of it are shown."""
    return hdr.to_sdr(pixels.astype(np.uint16) * 257, transfer, primaries)


def in_srgb(image: Image.Image) -> Image.Image:
    """A picture with an ICC profile of other colours (Display P3, Adobe RGB, a printer's) as sRGB. A profile that is
    damaged, or of another kind of pixels, says nothing."""
    profile = image.info.get("icc_profile")
    base = image.convert("RGBA" if "transparency" in image.info else "RGB") if profile and image.mode == "P" else image
    if not profile or ALPHA.get(base.mode, base.mode) not in PROFILED:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        colours = base.convert(ALPHA[base.mode]) if base.mode in ALPHA else base
        made = ImageCms.profileToProfile(
            colours,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return image
    assert made is not None
    if base.mode in ALPHA:
        made.putalpha(base.convert(f"{ALPHA[base.mode]}A").getchannel("A"))
    return made
