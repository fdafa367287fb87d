"""What the data tools cost: ``python tools/benchmark/data.py [--part stages|workers|table] [--out data.json]``.

stages: processor seconds per stage on a 10-second 720p clip, beside decoding alone; the shared pass beside both.
workers: clips per second of two worker processes beside one, and whether a clip costs more when two are at work.
table: five million rows subtracted, deduplicated and sorted.

Every figure is printed, and with ``--out`` saved, as soon as it is there; all of it takes two to three minutes on two
idle cores. Processor time hardly depends on what else the machine does; the speed-up of two workers does.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import polars as pl

from opensora.config import run_main
from opensora.utils.files import write_text
from opensora.utils.temporary import TemporaryFolder
from opensora.utils.video import save_video
from tools.arguments import Bounded
from tools.data import table as table_tool
from tools.data.engine.decode import PixelWorker, decode, open_video
from tools.data.engine.process import prepare
from tools.data.engine.runners import Job, LocalRunner
from tools.data.engine.stage import NoOptions, PixelStage, Row, Stage, Worker
from tools.data.sample_footage import pan, scenery
from tools.data.stages.camera import Camera, CameraOptions
from tools.data.stages.cut import Cut, CutOptions
from tools.data.stages.frames import FrameSamples, FramesOptions
from tools.data.stages.ingest import Ingest, IngestOptions
from tools.data.stages.motion import Blur, BlurOptions, Flow, FlowOptions, Motion, MotionOptions
from tools.data.stages.ocr import Ocr, OcrOptions
from tools.data.stages.scenes import Scenes, ScenesOptions
from tools.outputs import add_overwrite, check_new

SIZE = (720, 1280)
FPS = 24
SHARED = ("motion", "blur", "camera", "frames")  # the pass that is to cost at most three times decoding
CLIPS = 8  # per worker, after its first
ROWS = 5_000_000


@dataclass
class Report:
    """Figures by part; each is printed and saved when it is added."""

    out: Path | None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, part: str, name: str, value: float, text: str = "") -> None:
        """Keep a figure and say what it means."""
        self.figures.setdefault(part, {})[name] = round(value, 4)
        if text:
            print(text, flush=True)
        if self.out:
            write_text(json.dumps(self.figures, indent=2), self.out)


# ---------------------------------------------------------------------------------------------------------- stages


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
        Motion(MotionOptions(), root),
        Camera(CameraOptions(), root),
        Flow(FlowOptions(), root),
        Blur(BlurOptions(), root),
        FrameSamples(FramesOptions(), root),
    ]


def row_stages(root: Path) -> list[Stage]:
    """Stages that work on a file of their own."""
    methods = [Scenes(ScenesOptions(method=method), root) for method in ("scdet", "adaptive", "transnetv2")]
    cut = Cut(CutOptions(), root)
    return [Ingest(IngestOptions(), root), *methods, cut, Ocr(OcrOptions(), root)]


def measure_stages(clip: Path, root: Path, repeats: int, report: Report) -> None:
    """Seconds of one core per stage."""
    base = cpu_seconds(lambda: decode_all(clip), repeats)

    def add(name: str, seconds: float, note: str = "") -> None:
        report.add("stages", name, seconds, f"  {name:<38}{seconds:7.2f} s{seconds / base:7.2f} x decoding{note}")

    add("decode", base)
    row = {"clip_id": "clip", "clip_path": clip.name}
    stages = pixel_stages(root)
    everything = tuple(stage.name for stage in stages)
    for names in (*((name,) for name in everything), SHARED, everything):
        worker = PixelWorker([stage for stage in stages if stage.name in names])
        label = f"{' + '.join(names)}, one pass" if len(names) > 1 else f"{names[0]} (with decoding)"
        seconds = cpu_seconds(lambda: worker(row, names), repeats)  # noqa: B023
        add(label, seconds, "  (at most 3 is the aim)" if names == SHARED else "")
    frames = PixelWorker(stages)(row, everything)["frames"]
    assert not isinstance(frames, Exception)
    facts = {"path": str(clip), "kind": "video", "source_id": "id", "scenes": [[0.0, 8.0]], **frames}
    for alone in row_stages(root):
        label = f"scenes, {alone.settings.method}" if alone.name == "scenes" else alone.name
        add(label, cpu_seconds(_once(alone, facts), repeats))


def _once(stage: Stage, facts: Row) -> Callable[[], Any]:
    """Does a row, and again: what a cut has left is removed first."""
    work = stage.worker()

    def once() -> None:
        for old in (stage.root / "clips").glob("*/*"):
            old.unlink()
        work(facts)

    return once


# --------------------------------------------------------------------------------------------------------- workers


class Timed(Stage):
    """The shared pass over one clip, with the process that did it, when it was done, and its processor time."""

    name = "timed"
    reads = ("clip_id", "clip_path")
    adds: ClassVar = {"process": pl.Int64, "done": pl.Float64, "cpu": pl.Float64}

    def worker(self) -> Worker:
        """Do one clip, on one thread however many workers there are: what is compared is their number."""
        prepare(os.cpu_count() or 1)
        stages = [stage for stage in pixel_stages(self.root) if stage.name in SHARED]
        worker = PixelWorker(stages)

        def work(row: Row) -> list[Row]:
            start = time.process_time()
            worker(row, SHARED)
            return [{"process": os.getpid(), "done": time.monotonic(), "cpu": time.process_time() - start}]

        return work


def measure_workers(clip: Path, root: Path, report: Report) -> None:
    """Clips per second of one and of two workers, from when each has done its first clip."""
    rates: list[float] = []
    costs: list[float] = []
    for workers in (1, 2):
        jobs = [
            Job({"clip_id": f"clip{n}", "clip_path": clip.name}, {"timed": str(n)})
            for n in range(workers * (CLIPS + 1))
        ]
        rows: list[Row] = []
        for _, outcomes in LocalRunner(workers).run([Timed(NoOptions(), root)], jobs):
            outcome = outcomes["timed"]
            assert isinstance(outcome, list), outcome
            rows += outcome
        first: dict[int, float] = {}
        for row in sorted(rows, key=lambda row: row["done"]):
            first.setdefault(row["process"], row["done"])
        warm = max(first.values())
        later = [row for row in rows if row["done"] > warm]
        seconds = max(row["done"] for row in later) - warm
        rates.append(len(later) / seconds)
        costs.append(statistics.median(row["cpu"] for row in later))
        busy = sum(row["cpu"] for row in later) / seconds
        note = f"{rates[-1]:.2f} clips/s, {costs[-1]:.2f} s of a processor per clip, {busy:.2f} processors at work"
        report.add("workers", f"clips_per_second_{workers}", rates[-1], f"  {workers} worker(s): {note}")
        report.add("workers", f"cpu_seconds_per_clip_{workers}", costs[-1])
    report.add(
        "workers", "speed_up", rates[1] / rates[0], f"  two workers do {rates[1] / rates[0]:.2f} x one (aim: 1.8)"
    )
    growth = costs[1] / costs[0]
    report.add(
        "workers", "cpu_growth", growth, f"  a clip costs {growth:.2f} x the processor time when two are at work"
    )


# ----------------------------------------------------------------------------------------------------------- table


def measure_table(root: Path, report: Report) -> None:
    """Subtracting, deduplicating and sorting five million rows."""
    frame = pl.select(path=pl.int_range(ROWS).cast(pl.String), n=pl.int_range(ROWS) * 7919 % ROWS)
    frame.write_parquet(root / "all.parquet")
    frame[::3].write_parquet(root / "some.parquet")
    del frame
    words = ["--subtract", str(root / "some.parquet"), "--dedup", "path", "--sort", "n"]
    start, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        table_tool.main([str(root / "all.parquet"), *words, "--out", str(root / "out.parquet")])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    text = f"  {ROWS:,} rows subtracted, deduplicated, sorted: {seconds:.1f} s ({cpu:.1f} s of processors)"
    report.add("table", "seconds", seconds, text)
    report.add("table", "cpu_seconds", cpu)


PARTS = ("stages", "workers", "table")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (may be given again; default: all)")
    number: dict[str, Any] = {"action": Bounded, "least": 1, "most": 600}
    parser.add_argument("--seconds", type=float, **number, default=10.0, help="length of the clip")
    parser.add_argument("--repeats", type=int, **number, default=2, help="runs of which the median counts")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.out:
        check_new(args.out, args.overwrite)
    parts = args.part or PARTS
    report = Report(args.out)
    prepare(os.cpu_count() or 1)  # one thread, as in a pool of a process per core
    with TemporaryFolder() as folder:
        root = folder
        if {"stages", "workers"} & set(parts):
            print(f"making {args.seconds:g} s of {SIZE[1]}x{SIZE[0]} at {FPS} frames/s", flush=True)
            frames = pan(scenery(SIZE[0] + 80, SIZE[1] + 400, 1), SIZE, round(args.seconds * FPS), x=1.5)
            clip = save_video(frames, root / "clip.mp4", FPS, crf=20)
            del frames
        if "stages" in parts:
            print("stages, on one core:", flush=True)
            measure_stages(clip, root, args.repeats, report)
        if "workers" in parts:
            print(f"workers, {' + '.join(SHARED)} in one pass:", flush=True)
            measure_workers(clip, root, report)
        if "table" in parts:
            print("table tool:", flush=True)
            measure_table(root, report)


if __name__ == "__main__":
    run_main(main)
