"""What ``make demo`` shows: a generated video and its contact sheet, from the weights that come with the repository."""

import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.diffusion.pipeline import VideoPipeline
from opensora.utils.logging import setup_logging
from opensora.utils.video import contact_sheet, save_video

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "demo.py"  # or demo_4step.py, in four steps instead of fifty
PROMPT = "a red circle moving right on a dark background"


def main(argv: list[str] | None = None) -> None:
    """Generate, save, print the paths."""
    del argv
    setup_logging()
    start = time.perf_counter()
    folder = ROOT / "samples" / "demo"
    pipe = VideoPipeline.from_config(ROOT / "configs" / "diffusion" / "inference" / CONFIG)
    result = pipe(PROMPT, seed=42)
    folder.mkdir(parents=True, exist_ok=True)
    video = save_video(result.frames[0], folder / "demo.mp4", fps=8)
    sheet = contact_sheet(result.frames, folder / "demo.png", frames=5, labels=[PROMPT], scale=3)
    print(f"prompt:        {PROMPT}")
    print(f"video:         {video}")
    print(f"contact sheet: {sheet}")
    print(f"seconds:       {time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    run_main(main)
