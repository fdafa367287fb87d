"""Draw the first frame of a scene of the demo world, to start a video from."""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.utils.errors import UserError
from opensora.utils.video import save_image
from tools.demo.world import BACKGROUNDS, COLORS, MARGIN, SHAPES, SIZE, Scene, draw_frame


def main() -> int:
    """Draw the picture and print its path; 2 for a shape that would not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/demo/blue_square.png"), help="picture to write")
    parser.add_argument("--color", choices=list(COLORS), default="blue", help="of the shape")
    parser.add_argument("--shape", choices=SHAPES, default="square", help="what to draw")
    parser.add_argument("--background", choices=list(BACKGROUNDS), default="light", help="medium grey of that kind")
    parser.add_argument("--radius", type=float, default=13.0, help="half the extent of the shape in px")
    parser.add_argument("--x", type=float, default=32.0, help="centre of the shape in px from the left")
    parser.add_argument("--y", type=float, default=48.0, help="centre of the shape in px from the top")
    args = parser.parse_args()
    try:
        for flag, value in (("--x", args.x), ("--y", args.y)):
            low, high = args.radius + MARGIN, SIZE - args.radius - MARGIN
            if not low <= value <= high:
                raise UserError(f"{flag} is {value}: with --radius {args.radius} it must be {low} to {high}")
        level = sum(BACKGROUNDS[args.background]) // 2
        scene = Scene(args.color, args.shape, "still", args.background, level, args.radius, (args.x, args.y), 0.0)
        print(save_image(draw_frame(scene, 0.0), args.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
