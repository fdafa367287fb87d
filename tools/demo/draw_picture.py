"""Draw a picture to start a video from: a shape of the demo world, or the lighthouse of ``assets/texts/i2v.csv``.

python tools/demo/draw_picture.py --color blue --shape square
python tools/demo/draw_picture.py --scene lighthouse
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.video import save_image
from tools.demo.lighthouse import draw_lighthouse
from tools.demo.world import BACKGROUNDS, COLORS, MARGIN, SHAPES, SIZE, Scene, draw_frame

PICTURES = {"shape": Path("assets/demo/blue_square.png"), "lighthouse": Path("assets/texts/i2v.png")}


def main(argv: list[str] | None = None) -> int:
    """Draw the picture and print its path; 0, as all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=list(PICTURES), default="shape", help="what to draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="picture to write (default: the one of the scene below assets/)")
    parser.add_argument("--color", choices=list(COLORS), default="blue", help="of the shape (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="square", help="which shape (default: %(default)s)")
    parser.add_argument("--background", choices=list(BACKGROUNDS), default="light", help="grey (default: %(default)s)")
    parser.add_argument("--radius", type=float, default=13.0, help="half its extent in px (default: %(default)s)")
    parser.add_argument("--x", type=float, default=32.0, help="its centre in px from the left (default: %(default)s)")
    parser.add_argument("--y", type=float, default=48.0, help="its centre in px from the top (default: %(default)s)")
    args = parser.parse_args(argv)
    out = args.out or PICTURES[args.scene]
    if args.scene == "lighthouse":
        print(save_image(draw_lighthouse(), out))
        return 0
    for flag, value in (("--x", args.x), ("--y", args.y)):
        low, high = args.radius + MARGIN, SIZE - args.radius - MARGIN
        if not low <= value <= high:
            raise UserError(f"{flag} is {value}: with --radius {args.radius} it must be {low} to {high}")
    level = sum(BACKGROUNDS[args.background]) // 2
    scene = Scene(args.color, args.shape, "still", args.background, level, args.radius, (args.x, args.y), 0.0)
    print(save_image(draw_frame(scene, 0.0), out))
    return 0


if __name__ == "__main__":
    run_main(main)
