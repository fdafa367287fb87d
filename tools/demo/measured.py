"""Shared by the demo's longer measurements: what they generate is kept, so that one that was killed resumes, and what
they find is a CSV, a table and a sheet."""

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensora.config import parse_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.plan import SIZE_MULTIPLE, frame_size
from opensora.generation.outputs import weight_records
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import write_beside, write_json, write_text
from opensora.utils.progress import Bar
from opensora.utils.video import contact_sheet
from tools.demo.scoring import mark
from tools.demo.world import SIZE
from tools.outputs import check_place, is_new

Frames = NDArray[np.uint8]
RUN, VIDEOS = "run.json", "videos"


class Measurement:
    """The folder of a measurement: one of the same measurement is resumed, any other is refused.

    Args:
        folder: of it.
        facts: all that its videos follow from, as JSON has it.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, json.loads(json.dumps(facts, default=str))
        run = folder / RUN
        if run.is_file():
            if _read(run) != self.facts:
                raise UserError(f"--out {folder} holds a measurement of something else, see {run}; give a new folder")
        elif not is_new(folder):
            raise UserError(f"--out {folder} exists and is not an empty folder; give a new one")

    def _path(self, name: str) -> Path:
        return self.folder / VIDEOS / f"{name}.npz"

    def has(self, name: str) -> bool:
        """Whether a video is there."""
        return self._path(name).is_file()

    def keep(self, name: str, frames: Frames) -> None:
        """Keep a video [T, H, W, 3]."""
        if not (self.folder / RUN).is_file():
            write_json(self.facts, self.folder / RUN)

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, frames=frames)

        write_beside(self._path(name), write)

    def frames(self, name: str) -> Frames:
        """A kept video."""
        with np.load(self._path(name)) as content:
            frames: Frames = content["frames"]
        return frames

    def make(
        self, cases: Sequence[Any], batch_size: int, shape: Callable[[Any], Any], make: Callable[[list[Any]], Any]
    ) -> None:
        """Make and keep the videos of cases that are not there yet.

        Args:
            cases: each with a ``name``.
            batch_size: how many are made at a time.
            shape: of a case; those of one shape are made together.
            make: gives the videos of a batch.
        """
        missing = [case for case in cases if not self.has(case.name)]
        with Bar(total=len(missing), desc="videos", unit="video") as progress:
            for kind in dict.fromkeys(map(shape, missing)):
                of_kind = [case for case in missing if shape(case) == kind]
                for first in range(0, len(of_kind), batch_size):
                    batch = of_kind[first : first + batch_size]
                    for case, frames in zip(batch, make(batch), strict=True):
                        self.keep(case.name, frames)
                    progress.update(len(batch))

    def write_csv(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write ``results.csv``; columns in the order in which rows first name them."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
        return write_text(text.getvalue(), self.folder / "results.csv")

    def write_sheet(self, videos: Sequence[tuple[str, Frames, bool]], frames: int, columns: int) -> Path:
        """Write ``sheet.png``: labelled videos, wrong ones in red frames."""
        labels, clips, right = zip(*videos)
        marked = [mark(clip, is_right) for clip, is_right in zip(clips, right)]
        path = self.folder / "sheet.png"
        return contact_sheet(marked, path, frames=frames, labels=labels, columns=columns, gap=6)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else int(value) if isinstance(value, bool | np.bool_) else value


@contextmanager
def measuring(
    args: argparse.Namespace, overrides: list[str], **facts: Any
) -> Iterator[tuple[VideoPipeline, Measurement]]:
    """The models of ``args.config`` with overrides, and the folder ``args.out``, which is nobody else's meanwhile.

    Args:
        args: with ``config``, ``out`` and ``seed``.
        overrides: of the config.
        facts: what else the videos follow from.

    Raises:
        UserError: a folder in use, videos of another size, or anything wrong with the config.
    """
    check_place(args.out, "--out", folder=True)
    cfg = parse_config([args.config, *overrides], InferenceOptions)
    height, width = frame_size(cfg.sampling_option, SIZE_MULTIPLE)
    if (height, width) != (SIZE, SIZE):
        raise UserError(f"{args.config} makes videos of {height} x {width} pixels; the demo world has {SIZE} x {SIZE}")
    pipe = VideoPipeline.from_config(cfg)
    found = {"config": pipe.cfg.to_dict(), "weights": weight_records(pipe.cfg), "seed": args.seed, **facts}
    with claimed(args.out):
        yield pipe, Measurement(args.out, found)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of all measurements."""
    parser.add_argument("config", help="inference config, e.g. configs/diffusion/inference/demo.py")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder, or that of a run to resume")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first video; the others count up")
    parser.add_argument("--eval_batch", "--eval-batch", type=int, default=8, help="videos generated at a time")
