"""A lighthouse at the sea in the evening, drawn with NumPy and Pillow: the picture of ``assets/texts/i2v.csv``."""

import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HORIZON = 0.56  # of the height, from the top
SUN = (0.30, 0.50)  # of width and height
SUPERSAMPLING = 2  # shapes are drawn so much larger, then reduced, which smooths their edges
SKY = ((0.0, (44, 62, 110)), (0.45, (146, 108, 140)), (0.8, (240, 150, 100)), (1.0, (255, 206, 140)))
SEA = ((0.0, (222, 150, 116)), (0.25, (98, 92, 128)), (1.0, (18, 34, 62)))


def draw_lighthouse(height: int = 576, width: int = 1024, seed: int = 0) -> np.ndarray:
    """The scene.

    Args:
        height, width: pixels of the picture.
        seed: of the clouds and the rocks.

    Returns:
        uint8 RGB [height, width, 3].
    """
    rng = np.random.default_rng(seed)
    rows, columns = height * SUPERSAMPLING, width * SUPERSAMPLING
    horizon = int(rows * HORIZON)
    picture = np.concatenate([_sky(horizon, columns, rows, rng), _sea(rows - horizon, columns, rng)])
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    _coast(image, horizon, rng)
    _tower(image)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def _gradient(stops: tuple, rows: int) -> np.ndarray:
    """Colours [rows, 1, 3] from the first stop to the last."""
    at = np.linspace(0, 1, rows)
    places = [place for place, _ in stops]
    return np.stack([np.interp(at, places, [color[c] for _, color in stops]) for c in range(3)], axis=-1)[:, None]


def _smooth_noise(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Soft noise [rows, columns] in 0 to 1, stretched sideways: several sizes of blurred grains."""
    total = np.zeros((rows, columns))
    for octave in range(4):
        grid = rng.random((3 * 2**octave, 4 * 2**octave)).astype(np.float32)
        layer = Image.fromarray(grid).resize((columns, rows), Image.Resampling.BICUBIC)
        total += np.asarray(layer) / 2**octave
    return (total - total.min()) / (total.max() - total.min())


def _sky(rows: int, columns: int, full: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:rows, 0:columns]
    sky = np.repeat(_gradient(SKY, rows), columns, axis=1)
    distance = np.hypot(x - SUN[0] * columns, y - SUN[1] * full) / full
    sky += np.exp(-distance / 0.11)[..., None] * np.array([90, 70, 30])
    cover = np.clip((_smooth_noise(rows, columns, rng) - 0.52) * 3.2, 0, 0.8)[..., None]
    clouds = np.array([196, 128, 130]) + np.exp(-distance / 0.3)[..., None] * np.array([60, 50, 10])
    sky = sky * (1 - cover) + clouds * cover
    disc = np.clip((0.033 - distance) * full / 3, 0, 1)[..., None]
    return sky * (1 - disc) + np.array([255, 240, 205]) * disc


def _sea(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:rows, 0:columns]
    depth = (y + 1) / rows
    sea = np.repeat(_gradient(SEA, rows), columns, axis=1)
    waves = np.zeros((rows, columns))
    for _ in range(14):  # waves grow towards the beholder: their phase runs with the logarithm of the depth
        along, across, phase = rng.normal(0, 5), rng.uniform(14, 90), rng.uniform(0, 2 * np.pi)
        waves += np.sin(across * np.log(depth + 0.02) * 2 + along * x / columns / (depth + 0.15) + phase)
    waves /= 14**0.5
    sea += (waves * (0.25 + 0.75 * depth))[..., None] * np.array([15, 17, 22])
    path = np.exp(-(((x / columns - SUN[0]) / (0.025 + 0.10 * depth)) ** 2)) * np.clip(waves * 0.8 + 0.35, 0, 1.4)
    return sea + (path * (1 - 0.65 * depth))[..., None] * np.array([170, 118, 62])


def _coast(image: Image.Image, horizon: int, rng: np.random.Generator) -> None:
    """A far shore on the left and the cliff with foam below it on the right."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    shore = [
        (x, horizon - int(0.012 * height * (1 + np.sin(x / width * 21)) * (x < 0.2 * width))) for x in range(width)
    ]
    draw.polygon([*shore[: width // 5], (width // 5, horizon), (0, horizon)], fill=(96, 74, 104))
    steps = np.linspace(0.52, 1.0, 60)
    rise = np.clip((steps - 0.52) / 0.13, 0, 1) ** 0.6
    top = 0.86 - 0.30 * rise + rng.normal(0, 0.004, len(steps))
    edge = [(x * width, y * height) for x, y in zip(steps, top)]
    foot = [(x * width, y * height) for x, y in zip(steps[::-1], 0.93 + rng.normal(0, 0.012, len(steps)))]
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(edge + foot, fill=255)
    grain = _smooth_noise(height, width, rng)[..., None]
    light = np.linspace(1.25, 0.6, width)[None, :, None]  # the sun is on the left
    rock = (np.array([58, 46, 52]) + grain * np.array([62, 48, 44])) * light
    image.paste(Image.fromarray(rock.clip(0, 255).astype(np.uint8)), mask=mask)
    foam = Image.new("L", image.size)
    pen = ImageDraw.Draw(foam)
    for x, y in foot:
        for _ in range(5):
            dx, dy, size = rng.normal(0, 0.012) * width, rng.normal(0, 0.008) * height, rng.uniform(2, 9)
            pen.ellipse([x + dx - 2 * size, y + dy - size / 2, x + dx + 2 * size, y + dy + size / 2], fill=150)
    image.paste((236, 216, 206), mask=foam.filter(ImageFilter.GaussianBlur(4)))
    grass = ImageDraw.Draw(image)
    for (x, y), (x2, y2) in itertools.pairwise(edge[14:]):
        grass.polygon([(x, y), (x2, y2), (x2, y2 + 16), (x, y + 22)], fill=(74, 78, 56))


def _tower(image: Image.Image) -> None:
    """White tower with two red bands, gallery, lamp and its glow; shaded from left to right like a cylinder."""
    width, height = image.size
    middle, base, head = 0.77 * width, 0.585 * height, 0.20 * height
    wide, narrow = 0.036 * width, 0.022 * width
    glow = Image.new("L", image.size)
    lamp_y = head - 0.028 * height
    radius = 0.1 * height
    ImageDraw.Draw(glow).ellipse([middle - radius, lamp_y - radius, middle + radius, lamp_y + radius], fill=120)
    image.paste((255, 226, 160), mask=glow.filter(ImageFilter.GaussianBlur(radius / 2)))
    draw = ImageDraw.Draw(image)
    for y in range(int(head), int(base)):
        share = (y - head) / (base - head)
        half = narrow + (wide - narrow) * share
        color = np.array([196, 58, 48] if 0.2 < share < 0.4 or 0.62 < share < 0.82 else [238, 228, 220])
        row = np.arange(int(middle - half), int(middle + half) + 1)
        across = (row - middle) / half
        shade = 0.42 + 0.62 * np.clip(1 - (across + 0.45) ** 2 / 2.1, 0, 1)
        for column, level in zip(row, shade):
            draw.point((int(column), y), fill=tuple(int(v) for v in (color * level).clip(0, 255)))
    for share in (0.3, 0.52, 0.72):
        window = head + share * (base - head)
        draw.rectangle([middle - 5, window - 11, middle + 5, window + 11], fill=(52, 48, 62))
    dark = (54, 44, 54)
    gallery = narrow * 1.5
    draw.rectangle([middle - gallery, head - 6, middle + gallery, head + 8], fill=dark)
    lantern = narrow * 0.8
    draw.rectangle([middle - lantern, head - 0.055 * height, middle + lantern, head - 6], fill=(255, 232, 168))
    for step in range(-2, 3):
        bar = middle + step * lantern / 2
        draw.line([bar, head - 0.055 * height, bar, head - 6], fill=dark, width=3)
    roof = head - 0.055 * height
    draw.polygon(
        [(middle - lantern * 1.3, roof), (middle + lantern * 1.3, roof), (middle, roof - 0.045 * height)],
        fill=(150, 44, 40),
    )
    draw.line([middle, roof - 0.045 * height, middle, roof - 0.07 * height], fill=dark, width=4)
