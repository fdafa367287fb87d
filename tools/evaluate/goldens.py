"""Guard the demo's quality: compare it with what is kept, or keep it as it is now.

    python tools/evaluate/goldens.py            compare; ends with status 1 if anything is worse
    python tools/evaluate/goldens.py --update   keep losses, videos, cost and time as they are, and print what changed

The test suite does the same comparison (tests/integration/test_quality.py). Update after a change that is meant to
change results, and look at the videos that are printed.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.diffusion.pipeline import VideoPipeline
from opensora.evaluation.quality import ssim
from opensora.utils.files import write_text
from opensora.utils.temporary import TemporaryFolder
from opensora.utils.video import save_image
from tools.evaluate import guard


def relative_change(old: float | None, new: float) -> str:
    """In words."""
    if old is None:
        return f"{new:.5g} (new)"
    return f"{old:.5g} -> {new:.5g} ({100 * (new / old - 1):+.2f} %)" if old != new else f"{new:.5g} (unchanged)"


def keep(name: str, values: Any) -> None:
    """Write one of the kept tables."""
    write_text(json.dumps(values, indent=1) + "\n", guard.GOLDEN / f"{name}.json")


def update_losses(found: list[float]) -> None:
    """Keep a curve, and print how it differs from the one before."""
    kept = guard.read_kept("losses")
    print("mean loss", relative_change(float(np.mean(kept)) if kept else None, float(np.mean(found))))
    if kept and len(kept) == len(found) and kept != found:
        relative = np.abs(np.array(found) / np.array(kept) - 1)
        print(f"  largest change {100 * relative.max():.2f} % at step {int(relative.argmax()) + 1}")
    keep("losses", found)


def update_videos(frames: list[guard.Frames]) -> None:
    """Keep videos, and print how like the ones before they are."""
    for clip, video, verdict in zip(frames, guard.VIDEOS, guard.judged(frames), strict=True):
        before = f"SSIM {ssim(guard.kept_video(video), clip):.4f} to before" if video.file.is_file() else "new"
        print(f"{video.file.name}: {before}; judged {'right' if verdict.right['all'] else verdict.label}")
        save_image(guard.side_by_side(clip), video.file)
    known = {video.file for video in guard.VIDEOS}
    for path in set(guard.GOLDEN.glob("*.png")) - known:
        print(f"{path.name}: not among the videos any more, deleted")
        path.unlink()


def update_numbers(name: str, found: Mapping[str, float]) -> None:
    """Keep numbers by name (others of the table stay), and print how they differ."""
    kept = guard.read_kept(name) or {}
    for key, value in found.items():
        print(f"{key}:", relative_change(kept.get(key), value))
    keep(name, {**kept, **found})


def compare_time(found: Mapping[str, float]) -> list[str]:
    """What is wrong with the time; nothing is known of other processors than those it was kept for."""
    kept = guard.read_kept("speed") or {}
    here = {name: value for name, value in kept.items() if name in found}
    if not here:
        print(f"time: none is kept for this processor ({guard.processor()}); --update keeps it")
    return guard.compare_cost(here, found)


def main(argv: list[str] | None = None) -> None:
    """Compare or update."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="keep everything as it is now")
    args = parser.parse_args(argv)
    os.chdir(guard.ROOT)  # where the demo's configs look for weights
    with TemporaryFolder() as folder:
        losses = guard.first_losses(folder / "demo")
    videos = guard.make_videos(VideoPipeline.from_config(guard.CONFIG))
    model, inputs = guard.demo_model()
    cost, time = guard.cost(model, inputs), {guard.processor(): round(guard.relative_time(model, inputs), 3)}
    if args.update:
        update_losses(losses)
        update_videos(videos)
        update_numbers("cost", cost)
        update_numbers("speed", time)
        print(f"kept in {guard.GOLDEN}: look at its pictures before they are committed")
        return
    report(
        {
            "losses": lambda: guard.compare_losses(guard.read_kept("losses"), losses),
            "videos": lambda: guard.compare_videos(videos),
            "cost": lambda: guard.compare_cost(guard.read_kept("cost"), cost),
            "time": lambda: compare_time(time),
        }
    )


def report(checks: Mapping[str, Callable[[], list[str]]]) -> None:
    """Print each comparison.

    Raises:
        SystemExit: with status 1, if anything is worse.
    """
    wrong = {name: check() for name, check in checks.items()}
    for name, lines in wrong.items():
        print(f"{name}: {'as kept' if not lines else ''}")
        for line in lines:
            print(f"  {line}")
    if any(wrong.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
