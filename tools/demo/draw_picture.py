"""Draw a picture to start a video from: a shape of the demo world, or the lighthouse of ``assets/texts/i2v.csv``.

python tools/demo/draw_picture.py --color blue --shape square
python tools/demo/draw_picture.py --scene lighthouse
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.video import IMAGE_EXTENSIONS, save_image
from tools.arguments import Bounded
from tools.demo.lighthouse import draw_lighthouse
from tools.demo.world import BACKGROUNDS, COLORS, MARGIN, SHAPES, SIZE, Scene, draw_frame
from tools.outputs import add_overwrite, write_new

PICTURES = {"shape": Path("assets/demo/blue_square.png"), "lighthouse": Path("assets/texts/i2v.png")}


def draw(args: argparse.Namespace) -> np.ndarray:
    """The picture that a command line asks for.

    Raises:
        UserError: a shape that would not fit.
    """
    if args.scene == "lighthouse":
        return draw_lighthouse()
    for flag, value in (("--x", args.x), ("--y", args.y)):
        low, high = args.radius + MARGIN, SIZE - args.radius - MARGIN
        if not low <= value <= high:
            raise UserError(f"{flag} is {value}: with --radius {args.radius} it must be {low} to {high}")
    level = sum(BACKGROUNDS[args.background]) // 2
    scene = Scene(args.color, args.shape, "still", args.background, level, args.radius, (args.x, args.y), 0.0)
    return draw_frame(scene, 0.0)


def main(argv: list[str] | None = None) -> int:
    """Draw the picture and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=list(PICTURES), default="shape", help="what to draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="picture to write (default: the one of the scene below assets/)")
    add_overwrite(parser)
    parser.add_argument("--color", choices=list(COLORS), default="blue", help="of the shape (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="square", help="which shape (default: %(default)s)")
    parser.add_argument("--background", choices=list(BACKGROUNDS), default="light", help="grey (default: %(default)s)")
    number: dict[str, Any] = {"type": float, "action": Bounded, "least": 0, "most": SIZE}
    parser.add_argument("--radius", **number, default=13.0, help="half its extent in px (default: %(default)s)")
    parser.add_argument("--x", **number, default=32.0, help="its centre in px from the left (default: %(default)s)")
    parser.add_argument("--y", **number, default=48.0, help="its centre in px from the top (default: %(default)s)")
    args = parser.parse_args(argv)
    out = args.out or PICTURES[args.scene]
    if out.suffix.lower() not in IMAGE_EXTENSIONS:
        raise UserError(f"--out {out}: '{out.suffix}' is no picture; use one of {' '.join(IMAGE_EXTENSIONS)}")
    print(write_new(out, partial(save_image, draw(args)), args.overwrite))
    return 0


if __name__ == "__main__":
    run_main(main)
