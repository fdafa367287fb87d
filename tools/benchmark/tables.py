"""Memory and time of sorting a large table into buckets: ``python tools/benchmark/tables.py [--rows 1000000]``.

Makes a parquet table and its shards on the spot, opens it as a training run would with ``memory_efficient``, and prints
what the process grew by, how long each stage took, and the table of buckets.
"""

import argparse
import gc
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opensora.benchmark.measuring import MIB, resident_bytes
from opensora.config import run_main
from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataset import VideoTextDataset
from opensora.datasets.rows import write_shards
from opensora.datasets.sampler import BucketBatchSampler
from opensora.utils.temporary import TemporaryFolder
from tools.arguments import Bounded

# Lengths and batch sizes of the first training stage of Open-Sora 2.0.
VIDEO_BATCHES = {5: 12, 37: 6, 69: 4, 101: 3}


def stage1_buckets() -> dict[str, dict[int, tuple[float, int]]]:
    """Bucket config with 33 lengths at 256px and pictures at three resolutions."""
    lengths = {1: (1.0, 45)}
    for first, batch in VIDEO_BATCHES.items():
        lengths.update(dict.fromkeys(range(first, first + 32, 4), (1.0, batch)))
    return {"256px": {**lengths, 129: (1.0, 3)}, "768px": {1: (0.5, 13)}, "1024px": {1: (0.5, 7)}}


def make_table(path: Path, rows: int) -> None:
    """Write a table and its shards, with sizes, lengths and captions as varied as those of scraped footage."""
    rng = np.random.default_rng(0)
    frames = np.where(rng.random(rows) < 0.2, 1, rng.integers(2, 400, rows))
    height, width = rng.choice([360, 480, 720, 1080, 1280], rows), rng.choice([480, 640, 1280, 1920], rows)
    columns = {
        "path": [f"/data/clips/part-{i // 1000:05d}/clip-{i:09d}.mp4" for i in range(rows)],
        "text": [f"Caption {i}: " + "a street at dusk with people and slowly moving lights " * 6 for i in range(rows)],
        "num_frames": frames,
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
        "fps": np.where(frames > 1, rng.choice([23.976, 24, 25, 29.97, 30, 60], rows), np.nan),
    }
    pq.write_table(pa.table(columns), path)
    write_shards(path)


def main(argv: list[str] | None = None) -> None:
    """Make the table, open it, assign buckets, print figures."""
    parser = argparse.ArgumentParser(description="memory and time of sorting a large table into buckets")
    parser.add_argument("--rows", type=int, action=Bounded, least=1, most=10**9, default=1_000_000)
    args = parser.parse_args(argv)
    with TemporaryFolder() as folder:
        path = folder / "clips.parquet"
        # In a process of its own, so that memory it leaves unused is not taken for memory that was there before.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make_table, path, args.rows).result()
        before, start = resident_bytes("VmRSS"), time.perf_counter()
        dataset = VideoTextDataset(str(path), fps_max=24, memory_efficient=True)
        opened = time.perf_counter()
        sampler = BucketBatchSampler(dataset, BucketTable(stage1_buckets()), seed=42)
        sorted_at = time.perf_counter()
        first = next(iter(sampler))
        begun = time.perf_counter()
        gc.collect()
        pa.default_memory_pool().release_unused()
        held = resident_bytes("VmRSS") - before
        read = [dataset.row(int(i))["path"] for i in np.random.default_rng(0).integers(0, args.rows, 200)]
        done = time.perf_counter()
        print(sampler.describe())
    print(f"rows               {args.rows}")
    print(f"memory held        {held / MIB:.0f} MiB")
    print(f"open               {opened - start:.2f} s")
    print(f"sort into buckets  {sorted_at - opened:.2f} s")
    print(f"begin an epoch     {begun - sorted_at:.2f} s (first micro-batch: {len(first)} clips)")
    print(f"read one row       {(done - begun) / len(read) * 1e3:.1f} ms")


if __name__ == "__main__":
    run_main(main)
