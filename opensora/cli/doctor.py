"""Check what is installed and what is missing, required and optional, then generate a small video."""

import argparse
import importlib.util
import time
from collections.abc import Iterable
from pathlib import Path

from opensora.cli import findings
from opensora.cli.findings import Finding
from opensora.utils.errors import first_line
from opensora.utils.temporary import TemporaryFolder
from opensora.utils.terminal import HelpFormatter

MARKS = {"ok": "ok", "note": "--", "missing": "!!"}
FAILED = 1  # exit status
PROMPT, STEPS, FRAMES = "a red circle moving right", 4, 17


def main(argv: list[str] | None = None) -> None:
    """Print what was found.

    Raises:
        SystemExit: status 1 if something is missing that the package cannot do without, or the demo fails.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    checks = parser.add_argument_group("checks")
    checks.add_argument("--no-demo", "--no_demo", action="store_true", help="skip the video")
    args = parser.parse_args(argv)
    torch_is_there = importlib.util.find_spec("torch") is not None
    needed = [
        *tell("", findings.package()),
        *tell("", findings.torch_and_cards()),
        *tell("", findings.room(Path.cwd())),
        *tell("", findings.video()),
        *tell("needed", findings.requirements()),
    ]
    tell("of use, not needed", findings.optional_packages(torch_is_there))
    missing = [each.name for each in needed if each.state == "missing"]
    if not args.no_demo and not missing:
        missing += [each.name for each in tell("the demo", demo()) if each.state == "missing"]
    if missing:
        print(f"\nnot in order: {', '.join(missing)}")
        raise SystemExit(FAILED)
    print("\nall in order")


def tell(heading: str, found: Iterable[Finding]) -> list[Finding]:
    """Print findings as they come; returns them."""
    if heading:
        print(f"\n{heading}:")
    told = []
    for each in found:
        fix = f"\n{'':22}-> {each.fix}" if each.fix else ""
        print(f"{MARKS[each.state]}  {each.name:<17} {each.text}{fix}", flush=True)
        told.append(each)
    return told


def demo() -> Iterable[Finding]:
    """A video of the small model, written and read again."""
    start = time.perf_counter()
    try:
        from opensora.diffusion.pipeline import VideoPipeline
        from opensora.utils.video import save_video, video_info

        pipe = VideoPipeline.from_pretrained("demo")
        frames = pipe(PROMPT, seed=42, num_steps=STEPS, num_frames=FRAMES, progress=False).frames[0]
        with TemporaryFolder() as folder:
            seen = video_info(save_video(frames, folder / "demo.mp4", fps=8))
        if seen.num_frames != FRAMES:
            raise ValueError(f"the mp4 holds {seen.num_frames} frames instead of {FRAMES}")
    except Exception as error:  # whatever a machine does not have
        why = f"{type(error).__name__}: {first_line(error)}"
        yield Finding("demo", why, "missing", f'opensora generate demo --prompt "{PROMPT}" --debug')
        return
    yield Finding("demo", f"{STEPS} steps and an mp4 on {pipe.device} in {time.perf_counter() - start:.1f} s")
