"""What the data tools cost: ``python tools/benchmark/data.py [--out data.json]``.

Seconds of one core per stage on a 10-second 720p clip, beside decoding alone; the shared pass over all pixel stages
beside the sum of its parts; two workers beside one; rows per second of the table tool.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import polars as pl

from opensora.config import run_main
from opensora.utils.video import save_video, write_text
from tools.data import table as table_tool
from tools.data.camera import Camera
from tools.data.cut import Cut
from tools.data.decode import PixelWorker, decode, open_video
from tools.data.frames import FrameSamples
from tools.data.ingest import Ingest
from tools.data.motion import Blur, Flow, Motion
from tools.data.ocr import Ocr
from tools.data.options import (
    BlurOptions,
    CameraOptions,
    CutOptions,
    FlowOptions,
    FramesOptions,
    IngestOptions,
    MotionOptions,
    OcrOptions,
    ScenesOptions,
)
from tools.data.runners import Job, LocalRunner
from tools.data.sample_footage import pan, scenery
from tools.data.scenes import Scenes
from tools.data.stage import PixelStage, Stage

SIZE = (720, 1280)
FPS = 24
JOBS = 6  # clips for the comparison of workers
ROWS = 5_000_000


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of this process's processor, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:] or times)


def decode_all(path: Path) -> None:
    """Decode a clip on one thread and look at nothing."""
    with open_video(path) as container:
        for _ in decode(container, path.name):
            pass


def pixel_stages(root: Path) -> list[PixelStage]:
    """All pixel stages with their defaults."""
    return [
        Motion(vars(MotionOptions()), root),
        Camera(vars(CameraOptions()), root),
        Flow(vars(FlowOptions()), root),
        Blur(vars(BlurOptions()), root),
        FrameSamples(vars(FramesOptions()), root),
    ]


def row_stages(root: Path) -> list[Stage]:
    """Stages that work on a file of their own."""
    methods = [
        Scenes({**vars(ScenesOptions()), "method": method}, root) for method in ("scdet", "adaptive", "transnetv2")
    ]
    cut = Cut(vars(CutOptions()), root)
    return [Ingest(vars(IngestOptions()), root), *methods, cut, Ocr(vars(OcrOptions()), root)]


def measure_stages(clip: Path, root: Path, repeats: int) -> dict[str, float]:
    """Seconds of one core per stage."""
    seconds = {"decode": cpu_seconds(lambda: decode_all(clip), repeats)}
    row = {"clip_id": "clip", "clip_path": clip.name}
    stages = pixel_stages(root)
    for stage in stages:
        worker = PixelWorker([stage])
        seconds[f"{stage.name} (with decoding)"] = cpu_seconds(lambda: worker(row, [stage.name]), repeats)  # noqa: B023
    together, names = PixelWorker(stages), [stage.name for stage in stages]
    seconds["all of these in one pass"] = cpu_seconds(lambda: together(row, names), repeats)
    frames = together(row, names)["frames"]
    assert not isinstance(frames, Exception)
    facts = {"path": str(clip), "kind": "video", "source_id": "id", "scenes": [[0.0, 8.0]], **frames}
    for alone in row_stages(root):
        work = alone.worker()
        target = root / "clips"

        def once(stage: Stage = alone, work: Any = work) -> None:
            for old in target.glob("*/*") if stage.name == "cut" else ():  # noqa: B023
                old.unlink()
            work(facts)

        label = f"scenes, {alone.settings['method']}" if alone.name == "scenes" else alone.name
        seconds[label] = cpu_seconds(once, repeats)
    return seconds


def measure_workers(clip: Path, root: Path) -> dict[str, float]:
    """Seconds on the wall for the shared pass over some clips, by number of workers; starting them does not count."""
    stages = pixel_stages(root)
    seconds = {}
    for workers in (1, 2):
        jobs = [
            Job({"clip_id": f"clip{n}", "clip_path": clip.name}, {stage.name: str(n) for stage in stages})
            for n in range(JOBS + workers)
        ]
        times = []
        for _ in LocalRunner(workers).run(stages, jobs):
            times.append(time.perf_counter())
        # from when each worker has done one
        seconds[f"{workers} worker{'s' if workers > 1 else ''}"] = times[-1] - times[workers - 1]
    return seconds


def measure_table(root: Path) -> float:
    """Seconds on the wall of subtracting, deduplicating and sorting five million rows."""
    frame = pl.DataFrame({"path": pl.Series(range(ROWS)).cast(pl.String), "n": pl.Series(range(ROWS)) * 7919 % ROWS})
    frame.write_parquet(root / "all.parquet")
    frame[::3].write_parquet(root / "some.parquet")
    start = time.perf_counter()
    words = [
        "--subtract",
        str(root / "some.parquet"),
        "--dedup",
        "path",
        "--sort",
        "n",
        "--out",
        str(root / "o.parquet"),
    ]
    table_tool.main([str(root / "all.parquet"), *words])
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clip")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median counts")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = pan(scenery(SIZE[0] + 80, SIZE[1] + 400, 1), SIZE, round(args.seconds * FPS), x=1.5)
        clip = save_video(frames, root / "clip.mp4", FPS, crf=20)
        del frames
        stages = measure_stages(clip, root, args.repeats)
        workers = measure_workers(clip, root)
        rows = measure_table(root)
    base = stages["decode"]
    print(f"{args.seconds:g} s of {SIZE[1]}x{SIZE[0]} at {FPS} frames/s, one core")
    for name, value in stages.items():
        print(f"{name:<28}{value:8.2f} s{value / base:8.2f} x decoding")
    one, two = workers.values()
    print(f"two workers against one: {one / two:.2f} x")
    print(f"table: {ROWS:,} rows subtracted, deduplicated, sorted in {rows:.1f} s")
    if args.out:
        report = {"stages": stages, "workers": workers, "table_seconds": rows, "clip_seconds": args.seconds}
        write_text(json.dumps(report, indent=2), args.out)


if __name__ == "__main__":
    run_main(main)
